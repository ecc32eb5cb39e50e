"""``patch.begin: prompt``: suspected prompts are read once more, under the patch, and the rest of the batch is not."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation import ContinuousBatchingManager

from spider_sense.bench import random_patch
from spider_sense.case import Case
from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.kv_cache import empty
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.patching import apply_patch
from spider_sense.policy import Patch, Policy, Rule

SHORT = 3
PROMPTS = (
    [1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8], [1, 5, 23, 24, 25, 26],
    [33, 12, 7], [1, 5, *range(40, 50)], [1, 5, 61, 62], [10, 11, 12, 13, 14, 15, 16],
)  # fmt: skip
SUSPECTED = [row for row, prompt in enumerate(PROMPTS) if len(prompt) <= SHORT]
OTHERS = [row for row in range(len(PROMPTS)) if row not in SUSPECTED]
WIDTH, NEW, ALPHA = 17, 8, 0.7
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
RULES = (Rule(detector="*", zone="suspect", action="patch"), Rule(detector="*", zone="breach", action="stop"))
POLICY = Policy(rules=RULES, patch=Patch(alpha=ALPHA, begin="prompt"))
TOKEN = POLICY.model_copy(update={"patch": Patch(alpha=ALPHA)})
Builder = Callable[[str], Any]


def scaled(what: LoadedModel) -> LoadedModel:
    """Scale the weights up, so that no two hidden states are alike."""
    with torch.no_grad():
        for weight in what.model.parameters():
            weight.mul_(6 if weight.dim() == 2 else 1)
    return what


@pytest.fixture
def what(tiny_loaded: LoadedModel) -> LoadedModel:
    return scaled(tiny_loaded)


@pytest.fixture
def suspecting(guards: Any) -> Callable[..., Guard]:
    """Return a builder of guards that suspect prompts of up to ``bound`` tokens; what of longer ones, it is told."""

    def build(what: LoadedModel, longer: tuple[float, float] = (1e6, 2e6), bound: int = SHORT) -> Guard:
        # A mean would tell a token that is folded twice.
        probe, thresholds = guards.probe("short", "mean", "resid.0"), guards.calibration(-1e6, 2e6, longer, bound)
        guard: Guard = guards.guard(what, [probe], thresholds)
        return guard

    return build


@contextmanager
def guarded(what: LoadedModel, guard: Guard, policy: Policy = POLICY, **options: Any) -> Iterator[Monitor]:
    patch = random_patch(what, scale=1.0)
    with Monitor(guard, policy, patch=patch, **options).attach(what.model, what.tokenizer) as monitor:
        yield monitor


def generate(what: LoadedModel, guards: Any, **options: Any) -> Any:
    return what.model.generate(**guards.pad(PROMPTS), **{**GREEDY, **options})


def patched(what: LoadedModel, **inputs: Any) -> Any:
    """Generate with the patch in the weights, for every row and from the first token on."""
    change = apply_patch(what, random_patch(what, scale=1.0), ALPHA)
    try:
        model: Any = what.model
        return model.generate(**inputs)
    finally:
        change.revert()


@contextmanager
def passes(what: LoadedModel) -> Iterator[list[int]]:
    """Count the tokens of each pass through the first block."""
    seen: list[int] = []
    handle = what.model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    yield seen
    handle.remove()


def check(found: Any, under: Any, bare: Any) -> None:
    """Check the suspected rows against a run under the patch, and the others against one without, bit for bit."""
    for mine, theirs, without in zip(found.logits, under.logits, bare.logits, strict=True):
        torch.testing.assert_close(mine[SUSPECTED], theirs[SUSPECTED], rtol=1e-5, atol=1e-5)
        assert torch.equal(mine[OTHERS], without[OTHERS])
        assert (mine[SUSPECTED] != without[SUSPECTED]).any(-1).all()
    assert torch.equal(found.sequences[SUSPECTED], under.sequences[SUSPECTED])


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_two_of_eight_are_answered_as_if_the_patch_had_always_been_on(
    guards: Any, tiny_loaded: LoadedModel, tiny_model: Builder, suspecting: Any, name: str, same_step: bool
) -> None:
    what = scaled(replace(tiny_loaded, model=tiny_model(name)))
    guard, bare, under = suspecting(what), generate(what, guards), patched(what, **guards.pad(PROMPTS), **GREEDY)
    with Monitor(guard, Policy.shadow(), keep_history=True).attach(what.model, what.tokenizer) as shadow:
        generate(what, guards)
        unpatched = shadow.cases
    told: list[str] = []
    policy = POLICY.model_copy(update={"same_step": same_step})
    with guarded(what, guard, policy, keep_history=True, on_decision=lambda case: told.append(case.request.id)) as live:
        with passes(what) as seen:
            found = generate(what, guards)
        cases = live.cases
    check(found, under, bare)
    assert seen == [WIDTH, WIDTH, *[1] * (NEW - 1)]
    assert told == [cases[row].request.id for row in SUSPECTED]
    for row, (case, other, prompt) in enumerate(zip(cases, unpatched, PROMPTS, strict=True)):
        check_scores(case, other, prompt)
        assert case.patched_from == (0 if row in SUSPECTED else None)
        assert (case.history == other.history) == (row in OTHERS)


def check_scores(case: Case, unpatched: Case, prompt: list[int]) -> None:
    """Check that every token was scored once, and those of the prompt in its first reading."""
    assert (case.coverage.scored, case.coverage.missing) == (len(prompt) + NEW - 1, 0)
    assert [position for position, _ in case.history] == [position for position, _ in unpatched.history]
    assert case.history[0] == unpatched.history[0]


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches(guards: Any, what: LoadedModel, suspecting: Any, options: dict[str, Any]) -> None:
    bare, under = generate(what, guards, **options), patched(what, **guards.pad(PROMPTS), **{**GREEDY, **options})
    with guarded(what, suspecting(what)) as monitor:
        found = generate(what, guards, **options)
        assert [case.patched_from for case in monitor.cases] == [0 if row in SUSPECTED else None for row in range(8)]
        assert [case.coverage.scored for case in monitor.cases] == [len(prompt) + NEW - 1 for prompt in PROMPTS]
    check(found, under, bare)


def test_no_pass_is_run_again_for_nobody(guards: Any, what: LoadedModel, suspecting: Any) -> None:
    bare, positions = generate(what, guards), []
    for policy, bound in ((TOKEN, SHORT), (POLICY, 2)):
        policy = policy.model_copy(update={"same_step": True})
        with guarded(what, suspecting(what, bound=bound), policy, keep_history=True) as monitor, passes(what) as seen:
            found = generate(what, guards)
            positions.append([[position for position, _ in case.history] for case in monitor.cases])
        assert seen == [WIDTH, *[1] * (NEW - 1)]
        assert torch.equal(found.sequences[OTHERS], bare.sequences[OTHERS])
        assert torch.equal(found.logits[0], bare.logits[0])
    assert torch.equal(found.sequences, bare.sequences)
    # The prompt is judged once, and so is every step.
    assert positions[0] == positions[1]


def test_a_later_suspicion_begins_at_the_next_token(guards: Any, what: LoadedModel) -> None:
    bare, row, new = generate(what, guards), 5, 2
    ids = [*PROMPTS[row], *bare.sequences[row, WIDTH : WIDTH + new + 1].tolist()]
    site = next(iter(guards.probe("", "max", "resid.1").maps))
    seeker = guards.seeker("late", guards.hidden_states(what.model, ids, [site])[site][-1], "resid.1")
    guard = guards.guard(what, [seeker], guards.calibration(0.9999, 2.0))
    runs, starts = [], []
    for policy in (TOKEN, POLICY):
        with guarded(what, guard, policy) as monitor, passes(what) as seen:
            runs.append(generate(what, guards).sequences)
            starts.append([case.patched_from for case in monitor.cases])
        assert seen == [WIDTH, *[1] * (NEW - 1)]
    assert torch.equal(*runs)
    assert starts[0] == starts[1]
    assert starts[1] == [len(ids) + 1 if index == row else None for index in range(8)]


@pytest.mark.parametrize("filled", [False, True])
def test_a_prompt_that_no_single_pass_reads_is_refused(
    guards: Any, what: LoadedModel, suspecting: Any, filled: bool
) -> None:
    inputs, options, message = guards.pad(PROMPTS), {"prefill_chunk_size": 5}, "prefill_chunk_size=5: patch.begin is"
    if filled:
        with torch.no_grad():
            cache = what.model(inputs["input_ids"][:, :14], attention_mask=inputs["attention_mask"][:, :14])
        options, message = {"past_key_values": cache.past_key_values}, "which holds 14 tokens: patch.begin is"
    with guarded(what, suspecting(what)), pytest.raises(ConfigError, match=message):
        generate(what, guards, **options)
    with guarded(what, suspecting(what), TOKEN.model_copy(update={"on_missing": "observe"})):
        generate(what, guards, **options)


@pytest.mark.parametrize("same_step", [False, True])
def test_drafts_in_the_first_pass_are_read_again_with_the_prompt(
    guards: Any, what: LoadedModel, suspecting: Any, same_step: bool
) -> None:
    prompt = torch.tensor([[1, 5, *[20, 21, 22] * 4]])
    options = {**GREEDY, "prompt_lookup_num_tokens": 3, "return_dict_in_generate": False, "output_logits": False}
    bare = what.model.generate(prompt, **options)
    under = patched(what, input_ids=prompt, **options)
    guard = suspecting(what, bound=prompt.shape[1])
    policy = POLICY.model_copy(update={"same_step": same_step})
    with guarded(what, guard, policy) as monitor, passes(what) as seen:
        found = what.model.generate(prompt, **options)
        (case,) = monitor.cases
    assert seen[0] == seen[1] > prompt.shape[1]
    assert torch.equal(found, under)
    assert not torch.equal(found, bare)
    assert case.patched_from == 0
    assert (case.coverage.scored, case.coverage.missing) == (prompt.shape[1] + NEW - 1, 0)


def test_the_scores_of_accepted_drafts_are_those_under_the_patch(guards: Any, what: LoadedModel) -> None:
    """An answer that repeats itself is drafted; its last drafts are accepted in the pass that is run again."""
    prompt = torch.tensor([[1, 5, *[20, 21, 22] * 4]])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    probe, thresholds = guards.probe("all", "mean", "resid.1"), guards.calibration(-1e6, 2e6)
    runs = []
    for drafts in ({}, {"prompt_lookup_num_tokens": 3}):
        with guarded(what, guards.guard(what, [probe], thresholds)) as monitor:
            what.model.generate(prompt, **options, **drafts)
            runs.append(torch.from_numpy(monitor.cases[0].peak))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)


def test_sampled_copies_of_a_prompt(guards: Any, what: LoadedModel, suspecting: Any) -> None:
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": True, "num_return_sequences": 2}
    bare, under = generate(what, guards, **options), patched(what, **guards.pad(PROMPTS), **{**GREEDY, **options})
    with guarded(what, suspecting(what)) as monitor:
        found = generate(what, guards, **options)
        assert [case.patched_from for case in monitor.cases] == [
            0 if row in SUSPECTED else None for row in range(8) for _ in range(2)
        ]
    (mine,), (theirs,), (without,) = (run.logits for run in (found, under, bare))
    for row in range(16):
        if row // 2 in SUSPECTED:
            torch.testing.assert_close(mine[row], theirs[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(mine[row], without[row]) == (row // 2 in OTHERS)


@pytest.mark.parametrize("everybody", [False, True])
def test_a_breach_at_the_prompt_stops_before_the_first_token(
    guards: Any, what: LoadedModel, suspecting: Any, everybody: bool
) -> None:
    under = patched(what, **guards.pad(PROMPTS), **GREEDY)
    guard = suspecting(what, (-2e6, -1e6), bound=0 if everybody else SHORT)
    refusal = what.tokenizer(POLICY.refusal, add_special_tokens=False)["input_ids"]
    with guarded(what, guard) as monitor, passes(what) as seen:
        found = generate(what, guards, max_new_tokens=NEW, min_new_tokens=None)
        cases = monitor.cases
    assert seen.count(WIDTH) == (1 if everybody else 2)
    for row, case in enumerate(cases):
        stopped = everybody or row in OTHERS
        assert (case.stopped_after, case.patched_from) == ((0, None) if stopped else (None, 0))
        said = found.sequences[row, WIDTH:]
        if stopped:
            assert said[: len(refusal)].tolist() == refusal[: len(said)]
        else:
            torch.testing.assert_close(found.logits[0][row], under.logits[0][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["forward", "in place", "blocks"])
def test_compiled_models(guards: Any, what: LoadedModel, suspecting: Any, how: str) -> None:
    bare, under = generate(what, guards), patched(what, **guards.pad(PROMPTS), **GREEDY)
    if how == "forward":
        what.model.forward = torch.compile(what.model.forward, backend="eager")
    elif how == "in place":
        what.model.compile(backend="eager")
    else:
        for block in what.model.model.layers:
            block.compile(backend="eager")
    with guarded(what, suspecting(what)) as monitor:
        found = generate(what, guards)
        assert [case.patched_from for case in monitor.cases] == [0 if row in SUSPECTED else None for row in range(8)]
    check(found, under, bare)


@pytest.mark.parametrize("before", [False, True])
def test_other_hooks_of_the_model_see_the_pass_that_counts(
    guards: Any, what: LoadedModel, suspecting: Any, before: bool
) -> None:
    seen: list[Tensor] = []

    def prefer(_model: Any, _inputs: Any, output: Any) -> None:
        output.logits[..., 7] += 1e4
        seen.append(output.logits[:, -1])

    with ExitStack() as stack:
        if before:
            what.model.register_forward_hook(prefer)
        stack.enter_context(guarded(what, suspecting(what)))
        if not before:
            what.model.register_forward_hook(prefer)
        found = generate(what, guards)
    assert (found.sequences[:, WIDTH:] == 7).all()
    assert len(seen) == NEW
    assert torch.equal(seen[0], found.logits[0])


@pytest.mark.parametrize("static", [False, True])
def test_the_cache_is_refused_later(guards: Any, what: LoadedModel, suspecting: Any, static: bool) -> None:
    config = what.model.config
    cache: Any = StaticCache(config, max_cache_len=64) if static else DynamicCache(config=config)
    ids = torch.full((8, WIDTH + NEW + 1), 33)
    with guarded(what, suspecting(what)):
        generate(what, guards, past_key_values=cache)
        assert cache.get_seq_length() == WIDTH + NEW - 1
        with pytest.raises(ConfigError, match=f"those from {WIDTH - SHORT} on were computed under a patch"):
            what.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


def test_a_cache_is_empty_where_a_reset_would_keep_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of older releases of transformers does."""
    monkeypatch.setattr(DynamicLayer, "reset", CacheLayerMixin.reset)
    cache, kv = DynamicCache(), torch.ones(1, 2, 3, 4)
    cache.update(kv, kv, 0)
    empty(cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(cache.update(2 * kv, 3 * kv, 0)[1], 3 * kv)


def test_what_is_no_cache_is_not_emptied() -> None:
    empty(None)
    with pytest.raises(ConfigError, match="cache of type object cannot be emptied"):
        empty(object())


def test_continuous_batching_refuses_the_policy(what: LoadedModel, suspecting: Any) -> None:
    with (
        guarded(what, suspecting(what)) as monitor,
        pytest.raises(ConfigError, match="continuous batching cannot read a prompt"),
    ):
        monitor._guarded.continuous._check()
    with guarded(what, suspecting(what), TOKEN) as monitor:
        monitor._guarded.continuous._check()


def test_a_batch_is_refused_before_it_runs(what: LoadedModel, suspecting: Any) -> None:
    with guarded(what, suspecting(what)), pytest.raises(ConfigError, match="continuous batching cannot read a prompt"):
        what.model.generate_batch([[33] * 4])
    own = what.model.init_continuous_batching
    vars(what.model)["init_continuous_batching"] = own
    with guarded(what, suspecting(what), TOKEN):
        assert isinstance(what.model.init_continuous_batching(), ContinuousBatchingManager)
    assert vars(what.model)["init_continuous_batching"] is own
