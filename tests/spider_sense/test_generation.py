"""Streamed scores equal those of a plain pass over the whole conversation, however ``generate`` gets there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
GREEDY = {"max_new_tokens": 14, "do_sample": False}
Builder = Callable[[str], Any]


def watch(what: LoadedModel, guard: Guard, policy: Policy | None = None) -> Monitor:
    return Monitor(guard, policy or Policy.shadow()).attach(what.model, what.tokenizer)


@pytest.fixture
def guard(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    result: Guard = guards.guard(tiny_loaded, guards.many_probes())
    return result


def compare(
    guards: Any, what: LoadedModel, guard: Guard, prompts: Sequence[Sequence[int]], side: str = "left", **options: Any
) -> torch.Tensor:
    """Generate with and without the monitor; tokens must not change and peaks must be those of plain passes."""
    batch = guards.pad(prompts, side)
    free: torch.Tensor = what.model.generate(**batch, **{**GREEDY, **options})
    with watch(what, guard) as monitor:
        output = what.model.generate(**batch, **{**GREEDY, **options})
        cases = monitor.cases
    assert torch.equal(output, free)
    if side == "left":
        guards.assert_streamed(guard, what.model, cases, prompts, output)
    return free


def test_a_padded_batch_of_every_architecture(
    guards: Any, tiny_loaded: LoadedModel, tiny_model: Builder, architecture: str
) -> None:
    what = replace(tiny_loaded, model=tiny_model(architecture))
    compare(guards, what, guards.guard(what, guards.many_probes()), PROMPTS)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 5},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_every_way_to_fill_the_cache(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard, options: dict[str, Any]
) -> None:
    batch = guards.pad(PROMPTS)
    free = tiny_loaded.model.generate(**batch, **{**GREEDY, **options})
    with watch(tiny_loaded, guard) as monitor:
        output = tiny_loaded.model.generate(**batch, **{**GREEDY, **options})
        cases = monitor.cases
    free, output = (getattr(value, "sequences", value) for value in (free, output))
    assert torch.equal(output, free)
    guards.assert_streamed(guard, tiny_loaded.model, cases, PROMPTS, output)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "prompt", [[1, 5, *[20, 21, 22] * 4], PROMPTS[0], [9, 50, 8, 50]], ids=["loop", "head", "bare"]
)
def test_drafted_tokens_count_once_they_are_accepted(
    guards: Any, tiny_loaded: LoadedModel, tiny_model: Builder, architecture: str, prompt: list[int]
) -> None:
    what = replace(tiny_loaded, model=tiny_model(architecture))
    guard = guards.guard(what, guards.many_probes())
    drafted = compare(guards, what, guard, [prompt], prompt_lookup_num_tokens=3, max_new_tokens=40)
    assert torch.equal(drafted, what.model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False))


def test_an_assistant_model_drafts(guards: Any, tiny_loaded: LoadedModel, tiny_model: Builder, guard: Guard) -> None:
    compare(guards, tiny_loaded, guard, [PROMPTS[1]], assistant_model=tiny_model("llama"))


def test_right_padding_is_not_scored(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    # A plain pass with right padding says what the padded rows say; generate goes on behind the padding.
    batch = guards.pad(PROMPTS, "right")
    with watch(tiny_loaded, guard) as monitor:
        tiny_loaded.model.generate(**batch, max_new_tokens=1, do_sample=False)
        cases = monitor.cases
    for case, prompt in zip(cases, PROMPTS, strict=True):
        want = guards.offline_peak(guard, tiny_loaded.model, prompt, len(prompt))
        torch.testing.assert_close(torch.from_numpy(case.peak), want, rtol=1e-5, atol=1e-5)
        assert (case.coverage.scored, case.coverage.missing) == (len(prompt), 0)
    compare(guards, tiny_loaded, guard, PROMPTS, side="right")


def test_without_a_mask_padding_is_inferred_as_generate_does(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard
) -> None:
    ids = guards.pad(PROMPTS)["input_ids"]
    with watch(tiny_loaded, guard) as monitor:
        for call in ({"inputs": ids}, {"input_ids": ids}):
            output = tiny_loaded.model.generate(**call, **GREEDY)
            cases = monitor.cases
        positional = tiny_loaded.model.generate(ids, **GREEDY)
    assert torch.equal(output, positional)
    guards.assert_streamed(guard, tiny_loaded.model, cases, PROMPTS, output)


@pytest.mark.parametrize("how", ["forward", "in place", "blocks"])
def test_compiled_models(guards: Any, tiny_loaded: LoadedModel, guard: Guard, how: str) -> None:
    model: Any = tiny_loaded.model
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    compare(guards, tiny_loaded, guard, PROMPTS, max_new_tokens=4)


def test_a_model_wrapped_by_compile(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    compiled: Any = torch.compile(tiny_loaded.model, backend="eager")
    with Monitor(guard, Policy.shadow()).attach(compiled, tiny_loaded.tokenizer) as monitor:
        output = compiled.generate(**guards.pad(PROMPTS), max_new_tokens=4, do_sample=False)
        cases = monitor.cases
    guards.assert_streamed(guard, tiny_loaded.model, cases, PROMPTS, output)


def test_sampled_copies_of_a_prompt(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 20}
    torch.manual_seed(3)
    free = tiny_loaded.model.generate(**guards.pad(PROMPTS), **{**GREEDY, **options})
    torch.manual_seed(3)
    with watch(tiny_loaded, guard) as monitor:
        output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **{**GREEDY, **options})
        cases = monitor.cases
    assert torch.equal(output, free)
    assert not torch.equal(output[0], output[1])
    guards.assert_streamed(guard, tiny_loaded.model, cases, [prompt for prompt in PROMPTS for _ in range(2)], output)


def early_end(guards: Any, what: LoadedModel) -> tuple[int, torch.Tensor]:
    """Return a token that the first row alone emits, and not as its first, so that as an end token it ends that row."""
    free = what.model.generate(**guards.pad(PROMPTS), **GREEDY, eos_token_id=None)
    rows = free[:, max(map(len, PROMPTS)) :].tolist()
    return next(token for token in rows[0][1:-3] if token not in rows[0][:1] + rows[1] + rows[2]), free


def test_a_row_that_ends_early_reads_the_same_alone(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    eos, _ = early_end(guards, tiny_loaded)
    with watch(tiny_loaded, guard) as monitor:
        for end in (
            {"eos_token_id": eos},
            {"eos_token_id": [eos, 2], "use_cache": False},
            {"generation_config": GenerationConfig(eos_token_id=eos)},
        ):
            output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY, **end)
            together = monitor.cases
            tiny_loaded.model.generate(torch.tensor([PROMPTS[0]]), **GREEDY, eos_token_id=eos)
            (alone,) = monitor.cases
            torch.testing.assert_close(together[0].peak, alone.peak, rtol=1e-5, atol=1e-5)
            assert [v.zone for v in together[0].verdicts] == [v.zone for v in alone.verdicts]
            assert (together[0].coverage, together[0].position) == (alone.coverage, alone.position)
            assert together[0].position < len(PROMPTS[0]) + 12
    guards.assert_streamed(guard, tiny_loaded.model, together, PROMPTS, output, eos)


def test_only_what_ends_a_row_in_generate_ends_its_scoring(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    token, free = early_end(guards, tiny_loaded)
    # The row goes on after a pad token, and after the tokenizer's end token if generate was not told of one.
    tiny_loaded.tokenizer.eos_token = tiny_loaded.tokenizer.convert_ids_to_tokens(token)
    guard = guards.guard(tiny_loaded, guards.many_probes())
    tiny_loaded.model.generation_config.eos_token_id = None
    with watch(tiny_loaded, guard) as monitor:
        for pad in (None, token):
            output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY, pad_token_id=pad)
            cases = monitor.cases
            assert torch.equal(output, free)
            assert [case.position for case in cases] == [len(prompt) + 12 for prompt in PROMPTS]
    guards.assert_streamed(guard, tiny_loaded.model, cases, PROMPTS, output, eos=-1)


@pytest.mark.parametrize("static", [False, True])
def test_a_prefix_that_was_never_seen_is_missing(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard, static: bool
) -> None:
    model, ids = tiny_loaded.model, torch.tensor([PROMPTS[1]])
    cache: Any = StaticCache(model.config, max_cache_len=64) if static else None
    cache = model(ids[:, :6], past_key_values=cache, use_cache=True).past_key_values
    with watch(tiny_loaded, guard, Policy(rules=(), on_missing="stop", refusal="w3")) as monitor:
        output = model.generate(ids, past_key_values=cache, **GREEDY)
        (case,) = monitor.cases
    assert (case.coverage.missing, case.decision.action) == (6, "stop")
    assert output[0, ids.shape[1] + 1 :].tolist() == [*tiny_loaded.tokenizer("w3")["input_ids"], 2]
