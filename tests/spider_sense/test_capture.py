from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import RequestState

from spider_sense.capture import Capture, CapturedSequence
from spider_sense.errors import SiteError, SpiderSenseError
from spider_sense.sites import resolve
from spider_sense.types import Site

Builder = Callable[[str], PreTrainedModel]
Hidden = dict[Site, Tensor]

SITES = [Site.parse(name) for name in ("resid.0", "resid.1", "mlp_in.1", "gate.0", "up.1")]
RESID = Site.parse("resid.0")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]


@pytest.fixture
def model(tiny_model: Builder) -> Any:
    """A tiny llama that does not stop by itself."""
    llama = tiny_model("llama")
    llama.generation_config.eos_token_id = None
    return llama


def plain(model: nn.Module, ids: Sequence[int], sites: Sequence[Site] = SITES) -> Hidden:
    """Run a sequence by itself, in one pass, and read the sites with hooks of the test's own."""
    seen: Hidden = {}

    def reader(site: Site, cut: slice) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            value = args[0] if output is None else output[0] if isinstance(output, tuple) else output
            seen[site] = value[0, :, cut].clone()

        return read

    handles = []
    for site in sites:
        place = resolve(model, site)
        register = place.module.register_forward_hook
        if place.reads == "input":
            register = place.module.register_forward_pre_hook  # type: ignore[assignment]
        handles.append(register(reader(site, slice(place.start, place.stop))))
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def padded(prompts: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    longest = max(len(ids) for ids in prompts)
    rows = [
        [*ids, *[0] * (longest - len(ids))] if side == "right" else [*[0] * (longest - len(ids)), *ids]
        for ids in prompts
    ]
    real = [[1] * len(ids) for ids in prompts]
    mask = [[*m, *[0] * (longest - len(m))] if side == "right" else [*[0] * (longest - len(m)), *m] for m in real]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def positions(batch: dict[str, Tensor]) -> Tensor:
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def assert_captured(sequence: CapturedSequence, expected: Hidden, count: int | None = None) -> None:
    assert set(sequence.hidden) == set(expected)
    for site, hidden_nD in expected.items():
        count = len(hidden_nD) if count is None else count
        assert sequence.positions[:count].tolist() == list(range(count))
        torch.testing.assert_close(sequence.hidden[site][:count], hidden_nD[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_architecture_is_captured_without_its_padding(tiny_model: Builder, architecture: str, side: str) -> None:
    model, batch = tiny_model(architecture), padded(PROMPTS, side)
    with torch.no_grad():
        with Capture(model, [RESID]) as capture:
            model(**batch, position_ids=positions(batch))
        taken = capture.take()
        for sequence, ids in zip(taken, PROMPTS, strict=True):
            # Hugging Face's own record of what flows out of the first block.
            expected_nD = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
            assert sequence.positions.tolist() == list(range(len(ids)))
            torch.testing.assert_close(sequence.hidden[RESID], expected_nD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_captures_what_single_passes_do(model: Any, side: str) -> None:
    batch = padded(PROMPTS, side)
    with Capture(model, SITES) as capture, torch.no_grad():
        model(**batch, position_ids=positions(batch))
    taken = capture.take()
    assert [sequence.key for sequence in taken] == [0, 1, 2]
    for sequence, ids in zip(taken, PROMPTS, strict=True):
        assert len(sequence.positions) == len(ids)
        assert_captured(sequence, plain(model, ids))


def test_a_batch_without_a_mask_is_all_tokens(model: Any) -> None:
    with Capture(model, SITES) as capture, torch.no_grad():
        model(torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]))
    first, second = capture.take()
    assert_captured(first, plain(model, PROMPTS[0]))
    assert_captured(second, plain(model, PROMPTS[0][::-1]))


def test_embeddings_in_place_of_ids_are_captured(model: Any) -> None:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
        with Capture(model, SITES) as capture:
            model(inputs_embeds=embeds)
    assert_captured(capture.take()[0], plain(model, PROMPTS[0]))


@pytest.mark.parametrize("chunks", [[4, 1, 1, 1], [1] * 7, [3, 4], [2, 2, 3]])
def test_a_kv_cache_changes_nothing(model: Any, chunks: list[int]) -> None:
    cache, ids, done = DynamicCache(config=model.config), torch.tensor([PROMPTS[0]]), 0
    with Capture(model, SITES) as capture, torch.no_grad():
        for count in chunks:
            model(ids[:, done : done + count], past_key_values=cache)
            done += count
    (sequence,) = capture.take()
    assert len(sequence.positions) == 7
    assert_captured(sequence, plain(model, PROMPTS[0]))


def test_a_left_padded_prefill_in_chunks_changes_nothing(model: Any) -> None:
    cache, batch = DynamicCache(config=model.config), padded(PROMPTS, "left")
    with Capture(model, SITES) as capture, torch.no_grad():
        for start, stop in [(0, 3), (3, 6), (6, 7)]:
            model(
                batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                position_ids=positions(batch)[:, start:stop],
                past_key_values=cache,
            )
    for sequence in capture.take():
        assert len(sequence.positions) == len(PROMPTS[int(str(sequence.key))])
        assert_captured(sequence, plain(model, PROMPTS[int(str(sequence.key))]))


@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}], ids=["plain", "chunked", "static"]
)
def test_generating_captures_every_token_that_went_through_the_model(model: Any, settings: dict[str, Any]) -> None:
    batch = padded(PROMPTS, "left")
    with Capture(model, SITES) as capture:
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False, disable_compile=True, **settings)
    taken = sorted(capture.take(), key=lambda sequence: int(str(sequence.key)))
    assert len(taken) == len(PROMPTS)
    for sequence, ids, row in zip(taken, PROMPTS, tokens.tolist(), strict=True):
        final = [*ids, *row[-5:]]
        # The last token is sampled and never read.
        assert sequence.positions.tolist() == list(range(len(final) - 1))
        assert_captured(sequence, plain(model, final[:-1]))


@pytest.mark.parametrize(("name", "settings"), [("gemma3_text", {"sliding_window": 6}), ("gpt2", {})])
def test_a_static_cache_names_the_tokens_of_other_architectures_too(
    tiny_model: Builder, name: str, settings: dict[str, int]
) -> None:
    model: Any = tiny_model(name)
    model.config.update(settings)
    model.generation_config.eos_token_id = None
    with Capture(model, [RESID]) as capture:
        tokens = model.generate(
            **padded(PROMPTS, "left"),
            max_new_tokens=9,
            do_sample=False,
            disable_compile=True,
            cache_implementation="static",
        )
    for sequence, ids, row in zip(capture.take(), PROMPTS, tokens.tolist(), strict=True):
        final = [*ids, *row[-9:-1]]
        assert len(sequence.positions) == len(final)
        assert_captured(sequence, plain(model, final, [RESID]))


def test_rejected_drafts_leave_nothing_behind(model: Any) -> None:
    repeating = [5, 6, 7, 5, 6, 7, 5, 6]
    with Capture(model, SITES) as capture:
        (tokens,) = model.generate(
            torch.tensor([repeating]),
            attention_mask=torch.ones(1, 8, dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
            prompt_lookup_num_tokens=3,
        ).tolist()
    (sequence,) = capture.take()
    assert sequence.positions.tolist() == list(range(len(sequence.positions)))
    assert len(sequence.positions) >= len(tokens) - 1
    # Drafts of the very last step may stand behind the final tokens.
    assert_captured(sequence, plain(model, tokens), count=len(tokens) - 1)


@contextmanager
def passes(module: nn.Module) -> Iterator[list[int]]:
    """Record how many tokens each pass through a module computes."""
    widths: list[int] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        widths.append(args[0].shape[1])

    handle = module.register_forward_pre_hook(record)
    yield widths
    handle.remove()


def test_drafts_are_in_fact_rejected_in_the_test_above(model: Any) -> None:
    with passes(model.model.layers[0]) as widths:
        tokens = model.generate(
            torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]), max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert sum(widths) > tokens.shape[1]
    assert max(widths[1:]) > 1


def compiled_wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(fullgraph=True, backend="eager")
    return model


def compiled_and_called(model: Any) -> Any:
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(torch.tensor([PROMPTS[0]]))
    return compiled


def compiled_in_place_and_called(model: Any) -> Any:
    compiled_in_place(model)
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    return model


@pytest.mark.parametrize(
    "prepare", [compiled_wrapped, compiled_in_place, compiled_and_called, compiled_in_place_and_called]
)
def test_a_compiled_model_is_captured_as_an_eager_one(tiny_model: Builder, prepare: Callable[[Any], Any]) -> None:
    expected = [plain(tiny_model("llama"), ids) for ids in PROMPTS]
    model, batch = prepare(tiny_model("llama")), padded(PROMPTS, "right")
    with torch.no_grad():
        for _ in range(2):
            with Capture(model, SITES) as capture:
                model(**batch)
                model(**batch)
            taken = capture.take()
            assert len(taken) == 3
            for sequence, hidden in zip(taken, expected, strict=True):
                assert len(sequence.positions) == len(hidden[RESID])
                assert_captured(sequence, hidden)


def generate_batch(model: Any, prompts: Sequence[list[int]], num_blocks: int) -> dict[str, Any]:
    results: dict[str, Any] = model.generate_batch(
        inputs=list(prompts),
        generation_config=GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=num_blocks, max_batch_tokens=16, allow_block_sharing=False
        ),
        warmup=False,
    )
    return results


@pytest.mark.parametrize(("num_blocks", "preempted"), [(32, False), (6, True)])
def test_continuous_batching_captures_each_request(
    model: Any, num_blocks: int, preempted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(range(5, 45)), [12, 13, 14], list(range(50, 30, -1)), [15]]
    original, resets = RequestState.create_equivalent_initial_request, list[str]()

    def counted(state: RequestState) -> RequestState:
        resets.append(state.request_id)
        return original(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counted)
    with Capture(model, SITES) as capture, passes(model.model.layers[0]) as widths:
        results = generate_batch(model, prompts, num_blocks)
    # The longest prompt was cut into chunks, and requests were packed.
    assert len(widths) < len(prompts) * 20
    assert bool(resets) == preempted
    taken = {sequence.key: sequence for sequence in capture.take()}
    assert set(taken) == set(results)
    assert len(taken) == len(prompts)
    for name, result in results.items():
        tokens = [*result.prompt_ids, *result.generated_tokens]
        assert len(result.generated_tokens) == 20
        assert taken[name].positions.tolist() == list(range(len(tokens) - 1))
        assert_captured(taken[name], plain(model, tokens[:-1]))


def trace(model: nn.Module) -> list[object]:
    """Everything that attaching may touch."""
    parts: list[object] = [ContinuousBatchProcessor._generation_step]
    for module in model.modules():
        parts += [list(value) for name, value in sorted(vars(module).items()) if "hooks" in name and value is not None]
        parts += [sorted(name for name in vars(module)), vars(module).get("_compiled_call_impl"), type(module).forward]
    return parts


@pytest.mark.parametrize("prepare", [lambda model: model, compiled_wrapped, compiled_in_place])
def test_detaching_leaves_no_trace(model: Any, prepare: Callable[[Any], Any]) -> None:
    model = prepare(model)
    before = trace(model)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits
        with Capture(model, SITES), Capture(model, SITES[:1]):
            assert trace(model) != before
            model(torch.tensor([PROMPTS[0]]))
        assert trace(model) == before
        torch.testing.assert_close(model(torch.tensor([PROMPTS[0]])).logits, expected, rtol=0, atol=0)


def test_an_error_inside_leaves_no_trace(model: Any) -> None:
    before = trace(model)
    with pytest.raises(IndexError), Capture(model, SITES):
        model(torch.tensor([[1000]]))
    assert trace(model) == before


def test_an_unknown_site_leaves_no_trace(model: Any) -> None:
    before = trace(model)
    with pytest.raises(SiteError, match=r"resid\.9"), Capture(model, [RESID, Site.parse("resid.9")]):
        pass
    assert trace(model) == before


def test_two_captures_at_once_see_the_same(model: Any) -> None:
    with Capture(model, SITES) as one, Capture(model, [RESID]) as other, torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    torch.testing.assert_close(one.take()[0].hidden[RESID], other.take()[0].hidden[RESID], rtol=0, atol=0)


def test_a_hook_that_does_not_run_is_an_error(model: Any) -> None:
    with Capture(model, [RESID, Site.parse("resid.1")]), torch.no_grad():
        layer = model.model.layers[1]
        model.model.layers[1] = type(layer)(model.config, 1)
        with pytest.raises(SpiderSenseError, match=r"nothing was captured at resid\.1"):
            model(torch.tensor([PROMPTS[0]]))
        model.model.layers[1] = layer


def test_what_is_overwritten_afterwards_stays_captured(model: Any) -> None:
    expected = plain(model, PROMPTS[0], [RESID])

    def overwrite(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.zero_()

    with Capture(model, [RESID]) as capture, torch.no_grad():
        handle = model.model.layers[0].register_forward_hook(overwrite)
        model(torch.tensor([PROMPTS[0]]))
        handle.remove()
    assert_captured(capture.take()[0], expected)


def test_what_was_taken_is_gone(model: Any) -> None:
    with Capture(model, [RESID]) as capture, torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
        assert len(capture.take()) == 1
        assert capture.take() == []
        model(torch.tensor([PROMPTS[1]]))
        assert_captured(capture.take()[0], plain(model, PROMPTS[1], [RESID]))


def test_a_sequence_that_begins_again_replaces_the_old_one(model: Any) -> None:
    with Capture(model, [RESID]) as capture, torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
        model(torch.tensor([PROMPTS[1]]))
    (sequence,) = capture.take()
    assert len(sequence.positions) == 3
    assert_captured(sequence, plain(model, PROMPTS[1], [RESID]))
