"""A pass that raises leaves no request's patch or steer behind for whoever runs the model next."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from spider_sense.bench import random_patch
from spider_sense.errors import ConfigError, PatchError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.patching import apply_patch
from spider_sense.policy import Policy
from spider_sense.types import Action

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
LOGITS: dict[str, Any] = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
ROWS = torch.tensor([[7], [8], [9]])


@pytest.fixture
def short_is_suspect(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    """A guard that finds prompts of three tokens suspect and all others clear."""
    probe = guards.probe("short", "max", "resid.0")
    guard: Guard = guards.guard(tiny_loaded, [probe], guards.calibration(-1e6, 2e6, longer=(1e6, 2e6), bound=3))
    guard.vectors["calm@resid.0"] = torch.ones(32)
    return guard


def attach(what: LoadedModel, guard: Guard, action: Action) -> Monitor:
    """Attach a monitor that answers a suspect with an action."""
    rules = ({"detector": "*", "zone": "suspect", "action": action},)
    steer = {"vector": "calm", "strength": 5.0}
    policy = Policy.model_validate({"rules": rules, "on_missing": "observe", "steer": steer, "patch": {}})
    return Monitor(guard, policy, patch=random_patch(what, scale=3.0)).attach(what.model, what.tokenizer)


def raise_at(call: int) -> Callable[..., None]:
    """Return a hook that raises when it is called for the given time."""
    calls: list[None] = []

    def hook(*_: object) -> None:
        calls.append(None)
        if len(calls) == call:
            raise RuntimeError("out of memory")

    return hook


@pytest.mark.parametrize("action", ["patch", "steer"])
def test_generate(guards: Any, tiny_loaded: LoadedModel, short_is_suspect: Guard, action: Action) -> None:
    model: Any = tiny_loaded.model
    bare = model.model(ROWS).last_hidden_state
    cache = DynamicCache(config=model.config)
    with attach(tiny_loaded, short_is_suspect, action) as monitor:
        hook = model.lm_head.register_forward_hook(raise_at(5))
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate(**guards.pad(PROMPTS), **GREEDY, past_key_values=cache)
        hook.remove()
        assert [case.acted_on for case in monitor.cases] == [False, False, True]
        assert model.model(ROWS).last_hidden_state.equal(bare)
        torch.testing.assert_close(model.model(ROWS[:1]).last_hidden_state, bare[:1])
        # What was computed under it stays out of later requests.
        with pytest.raises(ConfigError, match="past_key_values"):
            model.generate(torch.full((3, 30), 7), **GREEDY, past_key_values=cache)


def batching(model: Any) -> Any:
    """Return transformers' manager of continuous batching, not yet started."""
    model.set_attn_implementation("sdpa")
    generation = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=63, pad_token_id=0)
    blocks = ContinuousBatchingConfig(allow_block_sharing=False, num_blocks=64, max_batch_tokens=32, block_size=4)
    return model.init_continuous_batching(generation_config=generation, continuous_batching_config=blocks)


def result(manager: Any) -> Any:
    """Wait for one result and stop."""
    found = next((one for _ in range(50) if (one := manager.get_result(timeout=1)) is not None), None)
    manager.stop(block=True)
    return found


def test_continuous_batching(tiny_loaded: LoadedModel, short_is_suspect: Guard) -> None:
    model: Any = tiny_loaded.model
    manager = batching(model)
    bare = model.model(ROWS).last_hidden_state
    with attach(tiny_loaded, short_is_suspect, "patch") as monitor:
        hook = model.lm_head.register_forward_hook(raise_at(4))
        manager.start()
        manager.add_request([9, 50, 8], request_id="a", max_new_tokens=20)
        assert "out of memory" in str(result(manager).error)
        hook.remove()
        assert monitor.continuous["a"].patched_from is not None
        assert model.model(ROWS).last_hidden_state.equal(bare)


@pytest.mark.parametrize("change", ["dtype", "weights"])
def test_continuous_batching_refuses_a_model_that_was_changed(
    tiny_loaded: LoadedModel, short_is_suspect: Guard, change: str
) -> None:
    model: Any = tiny_loaded.model
    manager = batching(model)
    with attach(tiny_loaded, short_is_suspect, "patch") as monitor:
        if change == "dtype":
            model.to(torch.bfloat16)
        else:
            apply_patch(tiny_loaded, random_patch(tiny_loaded, scale=3.0))
        manager.start()
        manager.add_request([9, 50, 8, 7], request_id="a", max_new_tokens=4)
        refused = {"dtype": "detach it and attach it again", "weights": "was applied to the weights while"}[change]
        assert refused in str(result(manager).error)
        assert not monitor.continuous


def test_a_cancelled_request_is_closed(tiny_loaded: LoadedModel, short_is_suspect: Guard) -> None:
    manager = batching(tiny_loaded.model)
    closed: list[str] = []
    with attach(tiny_loaded, short_is_suspect, "observe") as monitor:
        begun = threading.Event()
        hook = tiny_loaded.model.lm_head.register_forward_hook(lambda *_: begun.set())
        manager.start()
        manager.add_request([9, 50, 8, 7], request_id="gone", max_new_tokens=100)
        assert begun.wait(60)
        manager.cancel_request("gone")
        close = monitor._guarded._judge.close
        monitor._guarded._judge.close = lambda case: (closed.append(case.request.id), close(case))  # type: ignore[assignment, func-returns-value]
        for name in ("next", "last"):
            manager.add_request([9, 50, 8, 6], request_id=name, max_new_tokens=4)
            assert manager.get_result(timeout=60).request_id == name
        hook.remove()
        manager.stop(block=True)
        assert closed[0] == "gone"


@pytest.mark.parametrize("kind", ["max", "mlp"])
def test_a_long_pass_over_a_part_of_the_model_is_left_alone(guards: Any, tiny_loaded: LoadedModel, kind: str) -> None:
    model: Any = tiny_loaded.model
    long = torch.arange(200)[None] % 60
    bare = model.model(long).last_hidden_state
    probe = next(one for one in guards.many_probes() if (one.maps[min(one.maps)].mlp_weight is None) == (kind == "max"))
    guard: Guard = guards.guard(tiny_loaded, [probe])
    guard.vectors["calm@resid.0"] = torch.ones(32)
    with attach(tiny_loaded, guard, "steer"):
        assert model.model(long).last_hidden_state.equal(bare)


@pytest.mark.parametrize("action", ["patch", "steer"])
def test_a_request_whose_id_is_a_number_is_acted_on(
    tiny_loaded: LoadedModel, short_is_suspect: Guard, action: Action
) -> None:
    manager = batching(tiny_loaded.model)
    with attach(tiny_loaded, short_is_suspect, action) as monitor:
        manager.start()
        manager.add_request([9, 50, 8], request_id=7, max_new_tokens=8)
        result(manager)
        (case,) = monitor.continuous.values()
    assert case.decision.action == action
    assert (case.patched_from if action == "patch" else case.steered_from) is not None


@pytest.mark.parametrize("how", ["forward", "in place", "blocks"])
def test_a_compiled_model_patches_the_same_rows(
    guards: Any, tiny_loaded: LoadedModel, short_is_suspect: Guard, how: str
) -> None:
    model: Any = tiny_loaded.model
    prompts = PROMPTS * 3
    with attach(tiny_loaded, short_is_suspect, "patch") as monitor:
        want = model.generate(**guards.pad(prompts), **LOGITS)
        starts = [case.patched_from for case in monitor.cases]
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
    for part in {"forward": [], "in place": [model], "blocks": model.model.layers}[how]:
        part.compile(backend="aot_eager")
    with attach(tiny_loaded, short_is_suspect, "patch") as monitor:
        got = model.generate(**guards.pad(prompts), **LOGITS)
        assert [case.patched_from for case in monitor.cases] == starts
    with attach(tiny_loaded, short_is_suspect, "observe"):
        plain = model.generate(**guards.pad(prompts), **LOGITS)
    others = [row for row, prompt in enumerate(prompts) if len(prompt) > 3]
    for eager, compiled, unpatched in zip(want.logits, got.logits, plain.logits, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)
        assert compiled[others].equal(unpatched[others])
    assert not got.logits[-1].equal(plain.logits[-1])


def test_a_patch_in_the_weights_is_refused_while_another_waits_beside_them(
    guards: Any, tiny_loaded: LoadedModel, short_is_suspect: Guard
) -> None:
    model: Any = tiny_loaded.model
    with attach(tiny_loaded, short_is_suspect, "patch"):
        applied = apply_patch(tiny_loaded, random_patch(tiny_loaded, scale=3.0))
        with pytest.raises(PatchError, match="was applied to the weights while"):
            model.generate(**guards.pad(PROMPTS), **GREEDY)
        applied.revert()
        model.generate(**guards.pad(PROMPTS), **GREEDY)
