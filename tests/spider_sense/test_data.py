"""Prompt sets: reading, labelling, splitting."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spider_sense.data import (
    EXTRACTION,
    INJECTION,
    MISUSE,
    Example,
    LabelledSet,
    LabelMap,
    digest,
    labelled,
    read_jsonl,
    split,
)
from spider_sense.errors import ConfigError, DataError


def example(name: str, label: str, source: str = "set", group: str | None = None) -> Example:
    return Example(id=name, text=f"text {name}", label=label, category="", source=source, group=group or name)


def many(source: str, count: int) -> list[Example]:
    return [example(f"{source}-{n}", "harmful" if n % 4 == 0 else "benign", source) for n in range(count)]


def write(folder: Path, *rows: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_is_read_whole(tmp_path: Path) -> None:
    row = {"id": "a", "text": "hi", "label": "benign", "category": "c", "response": "ho", "source": "x", "gold": 3}
    assert read_jsonl(write(tmp_path, row)) == [
        Example(
            id="a",
            text="hi",
            label="benign",
            category="c",
            source="prompts",
            group="prompts:a",
            response="ho",
            turns=None,
        )
    ]


def test_a_row_without_an_id_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"text": "a", "label": "x"}\n\n{"text": "b\u2028c", "label": "x"}', encoding="utf-8")
    assert [(row.id, row.text) for row in read_jsonl(path)] == [("prompts-1", "a"), ("prompts-3", "b\u2028c")]


def test_rows_of_a_pair_share_a_group(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "x", "pair": pair} for text, pair in (("a", 0), ("b", 0), ("c", 1))]
    groups = [row.group for row in read_jsonl(write(tmp_path, *rows))]
    assert groups[0] == groups[1] != groups[2]


def test_messages_become_turns(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    alone, beside = read_jsonl(
        write(
            tmp_path,
            {"messages": messages, "label": "x"},
            {"messages": messages, "text": "Hi", "label": "x"},
        )
    )
    assert alone.turns == beside.turns == (("system", "Be kind."), ("user", "Hi"))
    assert (alone.text, beside.text) == ("Be kind.\n\nHi", "Hi")


def test_a_label_may_be_left_out_if_the_caller_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"})
    (row,) = read_jsonl(path, require_label=False)
    assert row.label == ""
    assert MISUSE.label(row) is None
    with pytest.raises(DataError, match="line 1: the label is None"):
        read_jsonl(path)


GOOD = {"id": "a", "text": "t", "label": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "x"}, "the text is None; a row needs a 'text'"),
        ({"text": " \n", "label": "x"}, "the text is ' "),
        ({"text": 3, "label": "x"}, "the text is 3"),
        ({"text": "t", "label": 1}, "the label is 1; it must be a string"),
        ({"text": "t", "label": None}, "the label is None"),
        ({"id": "a", "text": "t", "label": "x"}, "the id 'a' is already on line 1"),
        (["text"], "holds \\['text'\\], not an object"),
        ({"messages": [], "label": "x"}, "a message is None"),
        ({"messages": "hi", "label": "x"}, "a message is None"),
        ({"messages": [{"role": "user"}], "label": "x"}, "a message is {'role': 'user'}"),
        ({"messages": [{"role": "user", "content": ""}], "label": "x"}, "the text is ''"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"prompts\.jsonl, line 2: {message}"):
        read_jsonl(write(tmp_path, GOOD, row))


@pytest.mark.parametrize("line", [b'{"text": "a"', b'{"text": "\xff", "label": "x"}', b"nonsense"])
def test_bad_json_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n\n" + line)
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 3: "):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.jsonl: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("label", "misuse", "injection", "extraction"),
    [
        ("harmful", True, None, None),
        ("harmful_noisy", True, None, None),
        ("jailbreak", True, None, None),
        ("injection", None, True, None),
        ("extraction", None, None, True),
        ("benign", False, False, False),
        ("jailbreak_benign_payload", False, False, False),
        ("utility", False, False, False),
        ("noncompliance_other", None, None, None),
    ],
)
def test_the_label_maps(label: str, misuse: bool | None, injection: bool | None, extraction: bool | None) -> None:
    row = example("a", label)
    assert (MISUSE.label(row), INJECTION.label(row), EXTRACTION.label(row)) == (misuse, injection, extraction)


def test_overrides_change_a_map() -> None:
    changed = MISUSE.with_overrides(["harmful_content=positive", "utility=ignore", "jailbreak=negative"])
    labels = ("harmful_content", "utility", "jailbreak", "harmful")
    assert [changed.label(example("a", label)) for label in labels] == [True, None, False, True]
    assert MISUSE.label(example("a", "utility")) is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("harmful", "cannot read 'harmful'; write LABEL=positive"),
        ("=positive", "cannot read '=positive'"),
        ("harmful=postive", "unknown side 'postive' in 'harmful=postive'; did you mean 'positive'?"),
    ],
)
def test_a_bad_override_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MISUSE.with_overrides([text])
    assert message in str(caught.value)


def test_a_label_cannot_be_on_both_sides() -> None:
    with pytest.raises(ConfigError, match="'a'"):
        LabelMap(positive=frozenset({"a"}), negative=frozenset({"a", "b"}))


def test_labelled_counts_what_it_ignores() -> None:
    rows = [example(str(n), label) for n, label in enumerate(["harmful", "odd", "benign", "odd", "injection"])]
    found = labelled(rows, MISUSE)
    assert found.examples == (rows[0], rows[2])
    assert found.labels.tolist() == [True, False]
    assert (found.ignored, found.ignored_labels) == (3, Counter(odd=2, injection=1))


@pytest.mark.parametrize(("present", "lacking"), [("benign", "positive"), ("harmful", "negative")])
def test_a_set_of_one_class_is_an_error_only_if_both_are_needed(present: str, lacking: str) -> None:
    rows = [example("a", present), example("b", "odd")]
    with pytest.raises(DataError, match=rf"no {lacking} example: the labels are .*'odd': 1.*LABEL={lacking}"):
        labelled(rows, MISUSE)
    assert len(labelled(rows, MISUSE, need_both=False)) == 1


def ids(part: LabelledSet) -> set[str]:
    return {row.id for row in part.examples}


def parts_by_id(rows: Sequence[Example], seed: int = 0) -> dict[str, str]:
    parts = split(labelled(rows, MISUSE), seed=seed)
    return {name: part for part, subset in parts.items() for name in ids(subset)}


def test_a_split_is_complete_and_keeps_labels_with_their_rows() -> None:
    whole = labelled(many("a", 100), MISUSE)
    parts = split(whole)
    assert list(parts) == ["train", "validation", "test"]
    assert sum(len(part) for part in parts.values()) == 100
    assert set().union(*map(ids, parts.values())) == ids(whole)
    for part in parts.values():
        assert part.labels.tolist() == [MISUSE.label(row) for row in part.examples]


def test_a_split_is_stratified_by_source_and_label() -> None:
    parts = split(labelled(many("a", 200) + many("b", 40), MISUSE))
    for name, fraction in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        counts = Counter((row.source, row.label) for row in parts[name].examples)
        for stratum, size in {("a", "harmful"): 50, ("a", "benign"): 150, ("b", "harmful"): 10}.items():
            assert abs(counts[stratum] - fraction * size) <= 1


def test_a_split_never_separates_a_group() -> None:
    rows = [example(f"{n}-{label}", label, group=f"pair-{n}") for n in range(60) for label in ("harmful", "benign")]
    parts = parts_by_id(rows)
    assert all(parts[f"{n}-harmful"] == parts[f"{n}-benign"] for n in range(60))


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = many("a", 100)
    assert parts_by_id(rows) == parts_by_id(rows[::-1])
    assert parts_by_id(rows) != parts_by_id(rows, seed=1)


def test_another_file_moves_no_row() -> None:
    alone, together = parts_by_id(many("a", 77)), parts_by_id(many("b", 31) + many("a", 77))
    assert alone == {name: part for name, part in together.items() if name.startswith("a-")}


def test_strata_of_one_row_do_not_all_go_to_one_part() -> None:
    rows = [example(f"{n}", "benign" if n % 2 else "harmful", source=f"source-{n}") for n in range(200)]
    counts = Counter(parts_by_id(rows).values())
    assert 90 < counts["train"] < 150
    assert min(counts["validation"], counts["test"]) > 20


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.2, "test": -0.2}, {"train": 1.0, "test": 0.0}])
def test_bad_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot split by"):
        split(labelled(many("a", 8), MISUSE), fractions)


def test_the_digest_sees_every_field_but_not_the_order() -> None:
    rows = many("a", 5)
    assert digest(rows) == digest(rows[::-1])
    changes: list[dict[str, object]] = [
        {"text": "other"},
        {"label": "other"},
        {"response": "other"},
        {"turns": (("user", "other"),)},
        {"group": "other"},
    ]
    changed = {digest([replace(rows[0], **change), *rows[1:]]) for change in changes}  # type: ignore[arg-type]
    assert len(changed | {digest(rows), digest(rows[1:])}) == len(changes) + 2
