"""The action patch: two of eight requests are patched, from one token on, and nobody else is."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.bench import random_patch
from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.patch import NeuronPatch
from spider_sense.policy import Patch, Policy, Rule
from spider_sense.sites import resolve
from spider_sense.types import Site

PROMPTS = (
    [1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8], [1, 5, 23, 24, 25, 26],
    [33, 12, 7], [1, 5, *range(40, 50)], [1, 5, 61, 62], [10, 11, 12, 13, 14, 15, 16],
)  # fmt: skip
WIDTH, NEW = 17, 12
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
ALPHA = 0.7
SUSPECT = Rule(detector="*", zone="suspect", action="patch")
POLICY = Policy(rules=(SUSPECT,), patch=Patch(alpha=ALPHA))
SITE = Site.parse("resid.0")
Builder = Callable[[str], Any]
Flags = dict[int, int]
"""Row of the batch, and the new token (0 for the first) at which it becomes suspect."""


def loaded(tiny_loaded: LoadedModel, model: Any) -> LoadedModel:
    """Scale the weights up, so that no two hidden states are alike."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() == 2 else 1)
    return replace(tiny_loaded, model=model)


@pytest.fixture
def what(tiny_loaded: LoadedModel) -> LoadedModel:
    return loaded(tiny_loaded, tiny_loaded.model)


def flagging(guards: Any, what: LoadedModel, said: Sequence[Sequence[int]], breach: float = 2.0) -> tuple[Guard, Flags]:
    """Return a guard that finds two requests suspect, each at one new token, by what they say without a patch."""
    hidden = [
        guards.hidden_states(what.model, [*prompt, *new], [SITE])[SITE]
        for prompt, new in zip(PROMPTS, said, strict=False)
    ]
    unit = torch.nn.functional.normalize(torch.cat(hidden), dim=-1)
    starts = [sum(map(len, hidden[:row])) for row in range(len(hidden))]
    probes: list[Any] = []
    flags: Flags = {}
    for row, new in ((row, new) for new in (2, 3, 4, 1) for row in range(1, len(hidden))):
        place = len(PROMPTS[row]) + new
        alike = unit @ unit[starts[row] + place]
        if len(flags) < 2 and row not in flags and new not in flags.values() and alike.topk(2).values[1] < 0.998:
            probes.append(guards.seeker(f"row{row}", hidden[row][place]))
            flags[row] = new
    assert len(flags) == 2, "too many tokens look the same"
    guard: Guard = guards.guard(what, probes, guards.calibration(0.999, breach))
    return guard, flags


def generate(what: LoadedModel, guards: Any, **options: Any) -> Any:
    return what.model.generate(**guards.pad(PROMPTS), **{**GREEDY, **LOGITS, **options})


def switched(what: LoadedModel, guards: Any, patch: NeuronPatch, ids: Tensor, column: int) -> list[Tensor]:
    """Return the logits [B, V] of each step of a plain loop whose weights are patched before a column is computed."""
    model = copy.deepcopy(what.model)
    mask = torch.cat((guards.pad(PROMPTS)["attention_mask"], torch.ones(len(ids), NEW, dtype=torch.long)), 1)
    positions, cache = mask.cumsum(1) - 1, DynamicCache(config=model.config)
    positions[mask == 0] = 0
    result = []
    for first, last in [(0, WIDTH), *((n, n + 1) for n in range(WIDTH, WIDTH + NEW - 1))]:
        if first == column:
            patch_weights(model, patch)
        with torch.no_grad():
            output = model(
                input_ids=ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=positions[:, first:last],
                past_key_values=cache,
            )
        result.append(output.logits[:, -1])
    return result


def patch_weights(model: Any, patch: NeuronPatch) -> None:
    """Say the patch by hand: W[rows] += alpha u."""
    with torch.no_grad():
        for site, target in patch.targets.items():
            place: Any = resolve(model, site)
            for neuron, cluster in zip(target.neuron_R.tolist(), target.cluster_R.tolist(), strict=True):
                place.module.weight[place.start + neuron] += ALPHA * target.vectors_KD[cluster]


def check(what: LoadedModel, guards: Any, patch: NeuronPatch, flags: Flags, late: int, found: Any, *same: Any) -> None:
    """Check the flagged rows against the switched loop, and the others against runs without a patch, bit for bit."""
    others = [row for row in range(len(PROMPTS)) if row not in flags]
    for row, new in flags.items():
        column = WIDTH + new + late
        want = switched(what, guards, patch, found.sequences, column)
        for step, (mine, theirs) in enumerate(zip(found.logits, want, strict=True)):
            torch.testing.assert_close(mine[row], theirs[row], rtol=1e-5, atol=1e-5)
            moved = not torch.equal(mine[row], same[0].logits[step][row])
            # The token at the column is the first under the patch; the logits that follow it are the first that differ.
            assert moved == (step > column - WIDTH)
    for run in same:
        for mine, theirs in zip(found.logits, run.logits, strict=True):
            assert torch.equal(mine[others], theirs[others])


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_two_of_eight_are_patched_from_one_token_on(
    guards: Any, tiny_loaded: LoadedModel, tiny_model: Builder, name: str, same_step: bool
) -> None:
    what = loaded(tiny_loaded, tiny_model(name))
    patch, bare = random_patch(what, scale=1.0), generate(what, guards)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    policy = POLICY.model_copy(update={"same_step": same_step})
    with Monitor(guard, Policy.shadow()).attach(what.model, what.tokenizer):
        unpatched = generate(what, guards)
    with Monitor(guard, policy, patch=patch).attach(what.model, what.tokenizer) as monitor:
        found = generate(what, guards)
    late = 1 if same_step else 2
    for row, case in enumerate(monitor.cases):
        assert case.decision.action == ("patch" if row in flags else "observe")
        assert case.patched_from == (len(PROMPTS[row]) + flags[row] + late if row in flags else None)
        assert case.coverage.complete
    check(what, guards, patch, flags, late, found, bare, unpatched)
    # The weights were never touched, and no gate stayed on.
    assert torch.equal(generate(what, guards).sequences, bare.sequences)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches_patch_the_same_tokens(guards: Any, what: LoadedModel, options: dict[str, Any]) -> None:
    patch, bare = random_patch(what, scale=1.0), generate(what, guards, **options)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    with Monitor(guard, POLICY, patch=patch).attach(what.model, what.tokenizer) as monitor:
        found = generate(what, guards, **options)
    assert [row for row, case in enumerate(monitor.cases) if case.patched_from is not None] == sorted(flags)
    check(what, guards, patch, flags, 2, found, bare)


@pytest.mark.parametrize("wrong", [False, True])
def test_drafted_tokens(guards: Any, what: LoadedModel, tiny_model: Builder, wrong: bool) -> None:
    """Whatever is drafted, the tokens are those of the patch from ``patched_from`` on."""
    patch, bare = random_patch(what, scale=1.0), generate(what, guards)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    row = next(iter(flags))
    prompt = torch.tensor([PROMPTS[row]])
    drafts = {"assistant_model": tiny_model("llama")} if wrong else {"prompt_lookup_num_tokens": 3}
    policy = POLICY.model_copy(update={"same_step": True})
    with Monitor(guard, policy, patch=patch).attach(what.model, what.tokenizer) as monitor:
        found = what.model.generate(prompt, **GREEDY, **drafts)[0]
        start = monitor.cases[0].patched_from
    assert start is not None
    assert start >= len(PROMPTS[row]) + flags[row] + 1
    patched = copy.deepcopy(what.model)
    patch_weights(patched, patch)
    with torch.no_grad():
        cache = what.model(found[None, :start]).past_key_values
        rest = patched(found[None, start:-1], past_key_values=cache).logits[0]
    rest[:, 2] = -torch.inf  # min_new_tokens forbids the end token
    assert torch.equal(rest.argmax(-1), found[start + 1 :])


def test_a_later_breach_still_stops(guards: Any, what: LoadedModel) -> None:
    patch, bare = random_patch(what, scale=1.0), generate(what, guards)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    with Monitor(guard, POLICY, patch=patch).attach(what.model, what.tokenizer):
        patched = generate(what, guards)
    row, new = min(flags.items(), key=lambda item: item[1])
    # What it says under the patch, three tokens on, is looked for by a probe for breaches.
    seen: dict[int, Tensor] = {}
    resolve(what.model, SITE).module.register_forward_hook(
        lambda _m, _a, out: seen.update({len(seen): (out[0] if isinstance(out, tuple) else out)[row, -1]})
    )
    with Monitor(guard, POLICY, patch=patch).attach(what.model, what.tokenizer):
        generate(what, guards)
    breach = guards.guard(what, [guards.seeker("breach", seen[new + 5])], guards.calibration(0.999, 0.9999))
    both = guards.guard(what, (*guard.probes, *breach.probes))
    details = (*guard.manifest.detectors, *breach.manifest.detectors)
    both = replace(both, manifest=both.manifest.model_copy(update={"detectors": details}))
    rules = (SUSPECT, Rule(detector="breach", zone="breach", action="stop"))
    policy = POLICY.model_copy(update={"rules": rules, "refusal": "w23"})
    with Monitor(both, policy, patch=patch).attach(what.model, what.tokenizer) as monitor:
        found = generate(what, guards)
    case = monitor.cases[row]
    assert (case.decision.action, case.stopped_after) == ("stop", new + 6)
    assert case.patched_from == len(PROMPTS[row]) + new + 2
    start = WIDTH + new + 6
    assert torch.equal(found.sequences[row, :start], patched.sequences[row, :start])
    ending = found.sequences[row, start:].tolist()
    assert ending[-2:] == [0, 0]
    assert what.tokenizer("w23")["input_ids"][0] in ending
    others = [other for other in range(len(PROMPTS)) if other != row]
    assert torch.equal(found.sequences[others], patched.sequences[others])


def test_steering_comes_on_top(guards: Any, what: LoadedModel) -> None:
    patch, bare = random_patch(what, scale=1.0), generate(what, guards)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    guard.vectors["calm@resid.0"] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    row = next(iter(flags))
    steer = {"detector": f"row{row}", "zone": "suspect", "action": "steer"}
    policy = Policy.model_validate(
        {"rules": (steer, SUSPECT), "steer": {"vector": "calm", "strength": 9.0}, "patch": {"alpha": ALPHA}}
    )
    with Monitor(guard, policy, patch=patch).attach(what.model, what.tokenizer) as monitor:
        found = generate(what, guards)
    for index, case in enumerate(monitor.cases):
        assert (case.steered_from is not None) == (index == row)
        assert (case.patched_from is not None) == (index in flags and index != row)
        assert torch.equal(found.logits[-1][index], bare.logits[-1][index]) == (index not in flags)


def test_the_audit_log_names_the_action(guards: Any, what: LoadedModel, tmp_path: Path) -> None:
    patch, bare = random_patch(what), generate(what, guards)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    with AuditLog(tmp_path / "log") as log, Monitor(guard, POLICY, log, patch=patch).attach(what.model, what.tokenizer):
        generate(what, guards)
    events = [AuditEvent.model_validate_json(line) for line in (tmp_path / "log").read_text().splitlines()]
    acted = [event for event in events if event.event == "action"]
    assert sorted((event.detector, event.action) for event in acted) == [
        (f"row{row}", "patch") for row in sorted(flags)
    ]


def test_a_folder_and_what_is_refused(guards: Any, what: LoadedModel, tiny_model: Builder, tmp_path: Path) -> None:
    bare = generate(what, guards)
    guard, flags = flagging(guards, what, bare.sequences[:, WIDTH:].tolist())
    patch = random_patch(what, scale=1.0).save_pretrained(tmp_path / "patch")
    named = POLICY.model_copy(update={"patch": Patch(folder=tmp_path / "patch", alpha=ALPHA)})
    runs = []
    for monitor in (Monitor(guard, POLICY, patch=patch), Monitor(guard, named)):
        with monitor.attach(what.model, what.tokenizer):
            runs.append(generate(what, guards).sequences)
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][sorted(flags)], bare.sequences[sorted(flags)])
    with pytest.raises(ConfigError, match="no patch was handed over"):
        Monitor(guard, POLICY)
    with pytest.raises(ConfigError, match="another was handed over"):
        Monitor(guard, named, patch=patch)
    with pytest.raises(PatchError, match="missing"):
        Monitor(guard, POLICY.model_copy(update={"patch": Patch(folder=tmp_path / "missing")}))
    other = random_patch(replace(what, model=tiny_model("qwen2")))
    with pytest.raises(MismatchError, match="tuned for"):
        Monitor(guard, POLICY, patch=other).attach(what.model, what.tokenizer)
    assert "generate" not in vars(what.model)


def batch(what: LoadedModel, prompts: Sequence[Sequence[int]], share: bool = False, **options: Any) -> list[list[int]]:
    settings = {"num_blocks": 64, "max_batch_tokens": 32, "block_size": 4, **options}
    outputs: Any = what.model
    outputs = outputs.generate_batch(
        [list(prompt) for prompt in prompts],
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=share, **settings),
        persistent_manager=share,
    )
    return [list(output.generated_tokens) for output in outputs.values()]


def continued(what: LoadedModel, patch: NeuronPatch, prompt: list[int], said: list[int], start: int) -> list[int]:
    """Return what is said from ``start`` on by patched weights on the cache of the tokens before it, token by token."""
    patched = copy.deepcopy(what.model)
    patch_weights(patched, patch)
    ids = [*prompt, *said][: start + 1]
    with torch.no_grad():
        cache = what.model(torch.tensor([ids[:start]])).past_key_values
        while len(ids) < len(prompt) + len(said):
            step = patched(torch.tensor([ids[-1:]]), past_key_values=cache)
            ids.append(int(step.logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def packed(what: LoadedModel) -> LoadedModel:
    what.model.set_attn_implementation("sdpa")
    return what


def test_continuous_batching_patches_the_flagged_requests(guards: Any, packed: LoadedModel) -> None:
    patch, free = random_patch(packed, scale=1.0), batch(packed, PROMPTS)
    guard, flags = flagging(guards, packed, free)
    with Monitor(guard, POLICY, patch=patch).attach(packed.model, packed.tokenizer) as monitor:
        said = batch(packed, PROMPTS)
        cases = dict(monitor.continuous)
        # Other requests under the same ids begin without the patch.
        short, long = min(flags, key=lambda row: len(PROMPTS[row])), 5
        assert [*batch(packed, [PROMPTS[short]]), *batch(packed, [PROMPTS[long]])] == [said[short], said[long]]
    assert long not in flags
    assert len(PROMPTS[long]) > (cases[f"req_{short}"].patched_from or NEW + WIDTH)
    for row, prompt in enumerate(PROMPTS):
        case = cases[f"req_{row}"]
        if row in flags:
            start = len(prompt) + flags[row] + 1
            assert (case.decision.action, case.patched_from) == ("patch", start)
            assert said[row] == continued(packed, patch, prompt, said[row], start)
            assert said[row] != free[row]
        else:
            assert (case.patched_from, said[row]) == (None, free[row])


def test_a_preempted_request_keeps_what_was_computed_before_the_patch(
    guards: Any, packed: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted: dict[str, int] = {}
    anew = RequestState.create_equivalent_initial_request

    def spy(state: Any) -> Any:
        preempted[state.request_id] = state.current_len()
        return anew(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", spy)
    patch, free = random_patch(packed, scale=1.0), batch(packed, PROMPTS)
    guard, _ = flagging(guards, packed, free)
    with Monitor(guard, POLICY, patch=patch).attach(packed.model, packed.tokenizer) as monitor:
        roomy = batch(packed, PROMPTS)
        starts = {name: case.patched_from for name, case in monitor.continuous.items()}
        for blocks in range(26, 12, -2):
            preempted.clear()
            tight = batch(packed, PROMPTS, num_blocks=blocks)
            assert tight == roomy
            assert {name: case.patched_from for name, case in monitor.continuous.items()} == starts
            if any(computed > (starts[name] or NEW + WIDTH) for name, computed in preempted.items()):
                return
    pytest.fail("no request was preempted while it was patched")


@pytest.mark.parametrize("action", ["patch", "steer", "observe"])
def test_blocks_made_under_a_patch_are_not_shared(guards: Any, packed: LoadedModel, action: Any) -> None:
    patch, free = random_patch(packed, scale=1.0), batch(packed, PROMPTS)
    guard, flags = flagging(guards, packed, free)
    guard.vectors["calm@resid.0"] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    row = next(iter(flags))
    rules = ({"detector": "*", "zone": "suspect", "action": action},)
    steer = {"vector": "calm", "strength": 9.0}
    policy = Policy.model_validate({"rules": rules, "on_missing": "observe", "steer": steer, "patch": {"alpha": ALPHA}})
    with Monitor(guard, policy, patch=patch).attach(packed.model, packed.tokenizer) as monitor:
        try:
            (said,) = batch(packed, [PROMPTS[row]], share=True)
            (first,) = monitor.continuous.values()
            longer = [*PROMPTS[row], *said, 50, 51]
            (answer,) = batch(packed, [longer], share=True)
        finally:
            packed.model.destroy_cached_continuous_batching_manager()
        second = list(monitor.continuous.values())[-1]
    assert second.request.prompt_length == len(longer)
    computed = len(PROMPTS[row]) + len(said) - 2  # of the last step's blocks the engine registers none
    start = {"patch": first.patched_from, "steer": first.steered_from, "observe": computed}[action]
    assert start is not None
    # Tokens of shared blocks are those that the guard has not seen in the second request.
    assert second.coverage.missing == start // 4 * 4
    assert action == "observe" or start // 4 < computed // 4
    assert answer == batch(packed, [longer])[0]
