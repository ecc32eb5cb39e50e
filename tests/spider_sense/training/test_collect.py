import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError, SiteError
from spider_sense.models import LoadedModel
from spider_sense.training import collect as collect_module
from spider_sense.training.collect import collect, load
from spider_sense.types import Site

SITES = [Site.parse("resid.1"), Site.parse("resid.0")]


def example(name: str, text: str, **fields: Any) -> Example:
    return Example(id=name, text=text, label="", category="", source="made", group=name, **fields)


EXAMPLES = [
    example("a", "w1 w2 w3"),
    example("b", "w4"),
    example("c", " ".join(f"w{n}" for n in range(20))),
    example("d", "w9 w8 w7 w6 w5"),
    example("e", "w1 <|im_end|> w2"),
]


@pytest.fixture
def loaded(tiny_loaded: LoadedModel) -> LoadedModel:
    """The tiny model, which does not stop by itself."""
    tiny_loaded.model.generation_config.eos_token_id = None
    return tiny_loaded


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard for every conversation."""
    monkeypatch.setattr(collect_module, "SHARD_BYTES", 1)


@contextmanager
def passes(loaded: LoadedModel, stop_at: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Record the shape of each forward pass; interrupt the one numbered ``stop_at``."""
    seen: list[tuple[int, int]] = []

    def record(module: object, args: tuple[Any, ...]) -> None:
        seen.append((args[0].shape[0], args[0].shape[1]))
        if len(seen) == stop_at:
            raise KeyboardInterrupt

    handle = loaded.model.model.layers[0].register_forward_pre_hook(record)
    yield seen
    handle.remove()


def expected(loaded: LoadedModel, ids: Sequence[int], skip: int) -> Tensor:
    """Run a conversation by itself, and normalise what Hugging Face says flowed out of the first block."""
    seen: list[Tensor] = []
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
        loaded.model(torch.tensor([list(ids)]))
        for layer in loaded.model.model.layers:
            layer._forward_hooks.clear()
    hidden_nPD = torch.stack([seen[site.layer][0, skip:] for site in SITES], 1)
    return hidden_nPD / (hidden_nPD.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def prompt(loaded: LoadedModel, item: Example) -> list[int]:
    return list(Chat(loaded.tokenizer).render(item.turns or item.text).ids)


def assert_same(one: ActivationSet, other: ActivationSet) -> None:
    assert (one.sites, one.ids, one.tail) == (other.sites, other.ids, other.tail)
    for field in ("starts", "prompt_rows", "skips"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    torch.testing.assert_close(one.hidden, other.hidden, rtol=2e-3, atol=2e-3)


def test_a_set_holds_what_single_passes_compute(loaded: LoadedModel, tmp_path: Path) -> None:
    found = collect(loaded, EXAMPLES, SITES, tmp_path, batch_tokens=60)
    assert found.sites == tuple(SITES)
    assert found.ids == ("a", "b", "c", "d", "e")
    assert (found.hidden.dtype, found.tail) == (torch.float16, 3)
    assert found.starts[-1] == len(found.hidden)
    for index, item in enumerate(EXAMPLES):
        ids = prompt(loaded, item)
        assert found.skips[index] == 6
        assert found.prompt_rows[index] == len(ids) - 6
        rows = found.hidden[found.rows(index)]
        torch.testing.assert_close(rows.float(), expected(loaded, ids, 6), rtol=2e-3, atol=2e-3)


def test_no_block_runs_that_no_site_needs(loaded: LoadedModel, tmp_path: Path) -> None:
    ran: list[int] = []
    for place, layer in enumerate(loaded.model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, place=place: ran.append(place))
    whole = collect(loaded, EXAMPLES, SITES, tmp_path / "whole")
    assert set(ran) == {0, 1}
    ran.clear()
    found = collect(loaded, EXAMPLES, SITES[1:], tmp_path / "first")
    assert set(ran) == {0}
    torch.testing.assert_close(found.hidden[:, 0], whole.hidden[:, 1], rtol=0, atol=0)
    # A response needs the whole model.
    collect(loaded, EXAMPLES[:1], SITES[1:], tmp_path / "response", respond=2)
    assert set(ran) == {0, 1}


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_do_not_change_what_is_captured(loaded: LoadedModel, tmp_path: Path, batch_tokens: int) -> None:
    whole = collect(loaded, EXAMPLES, SITES, tmp_path / "whole")
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES, SITES, tmp_path / "other", batch_tokens=batch_tokens)
    assert_same(found, whole)
    assert all(rows == 1 or rows * tokens <= batch_tokens for rows, tokens in seen)
    assert sum(rows for rows, _ in seen) == len(EXAMPLES)


def test_a_long_prompt_loses_its_middle(loaded: LoadedModel, tmp_path: Path) -> None:
    found = collect(loaded, EXAMPLES, SITES, tmp_path, max_tokens=16)
    cut = Chat(loaded.tokenizer).render(EXAMPLES[2].text, 16)
    assert found.prompt_rows[2] == 10
    torch.testing.assert_close(found.hidden[found.rows(2)].float(), expected(loaded, cut.ids, 6), rtol=2e-3, atol=2e-3)


def test_a_conversation_is_rendered_by_its_turns(loaded: LoadedModel, tmp_path: Path) -> None:
    turns = (("system", "w5"), ("user", "w1 w2"))
    found = collect(loaded, [example("t", "w5\n\nw1 w2", turns=turns)], SITES, tmp_path)
    ids = list(Chat(loaded.tokenizer).render(turns).ids)
    assert found.skips.tolist() == [1]
    torch.testing.assert_close(found.hidden.float(), expected(loaded, ids, 1), rtol=2e-3, atol=2e-3)


def test_a_response_of_the_example_is_what_the_model_reads(loaded: LoadedModel, tmp_path: Path) -> None:
    answered = example("r", "w1 w2", response="w30 w31 <|im_end|> w32")
    found = collect(loaded, [answered, EXAMPLES[0]], SITES, tmp_path, respond={"r": 4})
    ids = prompt(loaded, answered)
    given = loaded.tokenizer(answered.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert loaded.tokenizer.eos_token_id not in given
    assert len(given) > 4
    assert found.prompt_rows.tolist() == [len(ids) - 6, len(prompt(loaded, EXAMPLES[0])) - 6]
    assert found.starts[1] == len(ids) - 6 + 4
    rows = found.hidden[found.rows(0)]
    torch.testing.assert_close(rows.float(), expected(loaded, [*ids, *given[:4]], 6), rtol=2e-3, atol=2e-3)
    assert (tmp_path / "responses.jsonl").read_text() == ""


def test_without_respond_a_response_is_left_out(loaded: LoadedModel, tmp_path: Path) -> None:
    answered = replace(EXAMPLES[0], response="w30")
    assert_same(
        collect(loaded, [answered], SITES, tmp_path / "one"), collect(loaded, EXAMPLES[:1], SITES, tmp_path / "other")
    )


def test_a_generated_response_is_captured(loaded: LoadedModel, tmp_path: Path) -> None:
    found = collect(loaded, EXAMPLES, SITES, tmp_path, respond=5)
    written = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [item.id for item in EXAMPLES]
    for index, (item, row) in enumerate(zip(EXAMPLES, written, strict=True)):
        ids = prompt(loaded, item)
        single = loaded.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :].tolist()
        assert row["ids"] == single
        assert row["text"] == loaded.tokenizer.decode(single)
        assert found.prompt_rows[index] == len(ids) - 6
        rows = found.hidden[found.rows(index)]
        torch.testing.assert_close(rows.float(), expected(loaded, [*ids, *single[:-1]], 6), rtol=2e-3, atol=2e-3)


def test_the_end_of_sequence_and_all_after_it_are_dropped(loaded: LoadedModel, tmp_path: Path) -> None:
    whole = collect(loaded, EXAMPLES, SITES, tmp_path / "whole", respond=8)
    row = json.loads((tmp_path / "whole" / "responses.jsonl").read_text().splitlines()[0])
    end = row["ids"][3]
    length = row["ids"].index(end)
    loaded.model.generation_config.eos_token_id = [end, 1000]
    found = collect(loaded, EXAMPLES, SITES, tmp_path / "ended", respond=8)
    ended = json.loads((tmp_path / "ended" / "responses.jsonl").read_text().splitlines()[0])
    assert ended["ids"] == row["ids"][:length]
    count = int(found.prompt_rows[0]) + length
    assert found.starts[1] == count
    torch.testing.assert_close(found.hidden[:count], whole.hidden[:count], rtol=2e-3, atol=2e-3)


def test_only_those_named_get_a_response(loaded: LoadedModel, tmp_path: Path) -> None:
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES, SITES, tmp_path, respond={"b": 4, "d": 4, "c": 2})
    lengths = np.diff(found.starts) - found.prompt_rows
    assert lengths.tolist() == [0, 3, 1, 3, 0]
    names = [json.loads(line)["id"] for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert names == ["b", "c", "d"]
    # Four tokens for two together, two for one, and the prompts of the rest.
    assert [rows for rows, _ in seen] == [2, 2, 2, 2, 1, 1, 2]


def test_a_model_that_samples_by_default_is_read_greedily(loaded: LoadedModel, tmp_path: Path) -> None:
    plain = collect(loaded, EXAMPLES[:1], SITES, tmp_path / "plain", respond=6)
    loaded.model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=50.0)
    assert_same(plain, collect(loaded, EXAMPLES[:1], SITES, tmp_path / "sampling", respond=6))


def test_a_second_run_does_not_run_the_model(loaded: LoadedModel, tmp_path: Path) -> None:
    first = collect(loaded, EXAMPLES, SITES, tmp_path, respond={"b": 3})
    written = (tmp_path / "responses.jsonl").read_bytes()
    with passes(loaded) as seen:
        second = collect(loaded, EXAMPLES, SITES, tmp_path, respond={"b": 3})
    assert seen == []
    assert_same(first, second)
    assert torch.equal(first.hidden, second.hidden)
    assert (tmp_path / "responses.jsonl").read_bytes() == written
    assert_same(first, load(tmp_path))


@pytest.mark.usefixtures("small_shards")
def test_another_order_of_the_same_examples_is_just_loaded(loaded: LoadedModel, tmp_path: Path) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path)
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES[::-1], SITES, tmp_path)
    assert seen == []
    assert_same(found, collect(loaded, EXAMPLES[::-1], SITES, tmp_path / "anew"))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("changed", "respond"),
    [
        ([*EXAMPLES[:3], example("d", "w9 w8"), EXAMPLES[4]], 0),
        ([*EXAMPLES, example("f", "w11")], 0),
        (EXAMPLES, {"d": 1}),
        ([*EXAMPLES[:3], replace(EXAMPLES[3], response="w1 w2"), EXAMPLES[4]], {"d": 2}),
    ],
    ids=["text", "new", "respond", "response"],
)
def test_only_what_changed_is_captured_anew(
    loaded: LoadedModel, tmp_path: Path, changed: list[Example], respond: dict[str, int] | int
) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path)
    with passes(loaded) as seen:
        found = collect(loaded, changed, SITES, tmp_path, respond=respond)
    assert [rows for rows, _ in seen] == [1]
    assert_same(found, collect(loaded, changed, SITES, tmp_path / "anew", respond=respond))


@pytest.mark.usefixtures("small_shards")
def test_another_end_of_sequence_changes_what_was_generated_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path, respond={"b": 4})
    loaded.model.generation_config.eos_token_id = 2
    with passes(loaded) as seen:
        collect(loaded, EXAMPLES, SITES, tmp_path, respond={"b": 4})
    assert {rows for rows, _ in seen} == {1}
    assert len(list(tmp_path.glob("shard-*"))) == len(EXAMPLES)
    assert seen[0] == (1, len(prompt(loaded, EXAMPLES[1])))


@pytest.mark.usefixtures("small_shards")
def test_what_is_no_longer_asked_for_is_removed(loaded: LoadedModel, tmp_path: Path) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path)
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES[:2], SITES, tmp_path)
    assert seen == []
    assert found.ids == ("a", "b")
    assert len(list(tmp_path.glob("shard-*"))) == 2


def test_a_shard_that_holds_something_else_beside_is_not_mixed_in(loaded: LoadedModel, tmp_path: Path) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path)
    with passes(loaded) as seen:
        collect(loaded, EXAMPLES[:2], SITES, tmp_path)
    assert sum(rows for rows, _ in seen) == 2
    assert len(list(tmp_path.glob("shard-*"))) == 1


def tune(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[20:] *= 2


def halve(loaded: LoadedModel) -> None:
    loaded.model.bfloat16()


def rename(loaded: LoadedModel) -> None:
    loaded.tokenizer.add_tokens(["w99"])


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", [tune, halve, rename])
def test_another_model_shares_nothing(
    loaded: LoadedModel, tmp_path: Path, change: Callable[[LoadedModel], None]
) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path)
    change(loaded)
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES, SITES, tmp_path)
    assert sum(rows for rows, _ in seen) == len(EXAMPLES)
    assert_same(found, collect(loaded, EXAMPLES, SITES, tmp_path / "anew"))


def test_other_sites_share_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    collect(loaded, EXAMPLES, SITES, tmp_path)
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES, SITES[:1], tmp_path)
    assert len(seen) == 1
    assert found.hidden.shape[1] == 1


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_a_killed_run_goes_on(loaded: LoadedModel, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt), passes(loaded, stop_at):
        collect(loaded, EXAMPLES, SITES, tmp_path, batch_tokens=1)
    assert not any("hook" in name and value for name, value in vars(loaded.model).items())
    with pytest.raises(DataError, match=f"lacks {6 - stop_at} of 5 conversations; run the capture again"):
        load(tmp_path)
    loaded.model.model.layers[0]._forward_pre_hooks.clear()
    with passes(loaded) as seen:
        found = collect(loaded, EXAMPLES, SITES, tmp_path, batch_tokens=1)
    assert len(seen) == 6 - stop_at
    assert_same(found, collect(loaded, EXAMPLES, SITES, tmp_path / "whole"))


@pytest.mark.usefixtures("small_shards")
def test_what_a_kill_leaves_half_written_is_removed(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "shard-0123.tmp").write_bytes(b"half")
    (tmp_path / "shard-4567.safetensors").write_bytes(b"not in the manifest")
    (tmp_path / "notes.txt").write_text("mine")
    collect(loaded, EXAMPLES, SITES, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"notes.txt", "capture.json", "responses.jsonl"}
    assert not names & {"shard-0123.tmp", "shard-4567.safetensors"}
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: data[:-1] + b"\xff"])
def test_a_damaged_shard_is_named_and_can_be_deleted(
    loaded: LoadedModel, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = collect(loaded, EXAMPLES, SITES, tmp_path)
    shard = sorted(tmp_path.glob("shard-*"))[2]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DataError, match=rf"{shard.name}.*delete it and run again"):
        load(tmp_path)
    with pytest.raises(DataError, match=rf"{shard.name}.*delete it and run again"):
        collect(loaded, EXAMPLES, SITES, tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=rf"cannot read .*{shard.name}"):
        load(tmp_path)
    with passes(loaded) as seen:
        assert_same(whole, collect(loaded, EXAMPLES, SITES, tmp_path))
    assert len(seen) == 1


def test_a_damaged_manifest_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "capture.json").write_text('{"schema_version": 1, "pi')
    with pytest.raises(DataError, match=r"capture\.json is damaged or of another version.*(?s:.*)run again"):
        collect(loaded, EXAMPLES, SITES, tmp_path)


def test_a_folder_without_a_capture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name a folder that a capture was written to"):
        load(tmp_path)


def test_the_bar_counts_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    progress = Progress(disable=True)
    collect(loaded, EXAMPLES, SITES, tmp_path, respond={"a": 4}, progress=progress)
    total = sum(len(prompt(loaded, item)) for item in EXAMPLES) + 4
    assert (progress.tasks[0].total, progress.tasks[0].completed) == (total, total)
    again = Progress(disable=True)
    collect(loaded, EXAMPLES, SITES, tmp_path, respond={"a": 4}, progress=again)
    assert (again.tasks[0].total, again.tasks[0].completed) == (total, total)


def test_no_example_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no example"):
        collect(loaded, [], SITES, tmp_path)


def test_a_repeated_id_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' of other is already in made"):
        collect(loaded, [EXAMPLES[0], replace(EXAMPLES[0], source="other")], SITES, tmp_path)


def test_sites_of_two_widths_are_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'resid\.1': 32, 'gate\.0': 48"):
        collect(loaded, EXAMPLES, [SITES[0], Site.parse("gate.0")], tmp_path)
    with pytest.raises(ConfigError, match="at least one site"):
        collect(loaded, EXAMPLES, [], tmp_path)


def test_an_unknown_site_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"resid\.7"):
        collect(loaded, EXAMPLES, [Site.parse("resid.7")], tmp_path)


def test_a_limit_below_the_template_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens is 13, and the chat template alone needs 14"):
        collect(loaded, EXAMPLES, SITES, tmp_path, max_tokens=13)
    assert collect(loaded, EXAMPLES, SITES, tmp_path, max_tokens=14).skips.tolist() == [6] * 5


def test_an_activation_that_is_not_finite_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[loaded.tokenizer.convert_tokens_to_ids("w4")] = torch.inf
    with pytest.raises(DataError, match="example 'b' is not finite"):
        collect(loaded, EXAMPLES[:2], SITES, tmp_path)
