"""Which rows are positive."""

from collections import Counter

import pytest

from spider_sense.errors import ConfigError, DataError
from spider_sense.labels import EXTRACTION, INJECTION, MISUSE, LabelMap, labelled
from tests.prompt_rows import example


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
def test_a_set_of_one_class_is_an_error(present: str, lacking: str) -> None:
    rows = [example("a", present), example("b", "odd")]
    with pytest.raises(DataError, match=rf"no {lacking} example: the labels are .*'odd': 1.*LABEL={lacking}"):
        labelled(rows, MISUSE)
