"""Attaching and detaching: what is refused, and that nothing stays behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spider_sense.errors import ConfigError, MismatchError, SiteError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy, Rule, Steer

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def guard(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    result: Guard = guards.guard(tiny_loaded, guards.many_probes())
    return result


@pytest.fixture
def free(guards: Any, tiny_loaded: LoadedModel) -> torch.Tensor:
    """What the model says when nobody watches."""
    ids: torch.Tensor = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    return ids


def watch(what: LoadedModel, guard: Guard, **options: Any) -> Monitor:
    return Monitor(guard, Policy.shadow(), **options).attach(what.model, what.tokenizer)


def traces(model: Any) -> dict[str, Any]:
    """Return what hooks and attributes a model has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks = {f"{name}{kind}": dict(getattr(item, kind)) for name, item in model.named_modules() for kind in kinds}
    return {**hooks, "attributes": sorted(vars(model)), "generate": model.generate}


def test_detaching_leaves_no_trace(guards: Any, tiny_loaded: LoadedModel, free: torch.Tensor) -> None:
    model: Any = tiny_loaded.model
    for own in (None, lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)):
        if own is not None:
            model.generate = own
        before = traces(model)
        monitor = Monitor(guards.guard(tiny_loaded, guards.many_probes()), Policy.shadow())
        monitor.attach(model, tiny_loaded.tokenizer)
        assert traces(model) != before
        model.generate(**guards.pad(PROMPTS), **GREEDY)
        monitor.detach()
        monitor.detach()
        assert traces(model) == before
        assert torch.equal(model.generate(**guards.pad(PROMPTS), **GREEDY), free)
        monitor.attach(model, tiny_loaded.tokenizer)
        monitor.detach()
        assert len(monitor.cases) == len(PROMPTS), "the last call's stay readable"


def test_a_monitor_that_was_never_attached_knows_of_no_requests(tiny_loaded: LoadedModel, guard: Guard) -> None:
    monitor = Monitor(guard, Policy.shadow())
    monitor.detach()
    assert monitor.cases == []
    for ask in (lambda: monitor.continuous, monitor.close_ended):
        with pytest.raises(ConfigError, match=r"never attached.*attach\(model\) first"):
            ask()
    monitor.attach(tiny_loaded.model, tiny_loaded.tokenizer).detach()
    monitor.close_ended()
    assert monitor.continuous == {}


def test_a_guard_is_attached_once(tiny_loaded: LoadedModel, guard: Guard) -> None:
    model = tiny_loaded.model
    with watch(tiny_loaded, guard) as monitor:
        for other in (monitor, Monitor(guard, Policy.shadow())):
            with pytest.raises(ConfigError, match="attached"):
                other.attach(model, tiny_loaded.tokenizer)
        assert model.generate is monitor._guarded.generate
    assert "generate" not in vars(model)


def test_a_guard_for_something_else_leaves_the_model_alone(
    guards: Any, tiny_loaded: LoadedModel, tiny_model: Callable[[str], Any], guard: Guard
) -> None:
    other, monitor = tiny_model("qwen2"), Monitor(guard)
    before = traces(other)
    with pytest.raises(MismatchError, match="model_type"):
        monitor.attach(other, tiny_loaded.tokenizer)
    what = replace(tiny_loaded, model=other)
    missing = guards.guard(what, [guards.probe("a", "mean", "resid.7")])
    with pytest.raises(SiteError, match=r"resid\.7"):
        Monitor(missing).attach(other, tiny_loaded.tokenizer)
    with pytest.raises(ConfigError, match="no tokenizer"):
        monitor.attach(other)
    assert traces(other) == before
    half = tiny_loaded.model.half()
    with pytest.raises(MismatchError, match="uncertified"):
        monitor.attach(half, tiny_loaded.tokenizer)
    with monitor.attach(half, tiny_loaded.tokenizer, allow_uncertified=True):
        half.generate(**guards.pad(PROMPTS), **GREEDY)
        assert all(case.peak[0] > -torch.inf for case in monitor.cases)


def test_what_the_engine_cannot_do_is_refused(guard: Guard) -> None:
    rules = (Rule(detector="ema", zone="breach", action="stop"), Rule(detector="*", zone="suspect", action="throttle"))
    with pytest.raises(ConfigError, match=r"rules\.1\.action: .* cannot 'throttle'; it can: .*patch"):
        Monitor(guard, Policy(rules=rules))
    with pytest.raises(ConfigError, match="on_missing"):
        Monitor(guard, Policy(rules=(), on_missing="throttle"))


def test_a_policy_must_speak_of_what_the_guard_has(guard: Guard) -> None:
    with pytest.raises(ConfigError, match="'atention'; did you mean 'attention'"):
        Monitor(guard, Policy(rules=(Rule(detector="atention", zone="breach", action="stop"),)))
    with pytest.raises(ConfigError, match="no steering vector 'calm'"):
        Monitor(guard, Policy(rules=(), steer=Steer(vector="calm", strength=1.0)))


def test_passes_outside_generate_are_left_alone(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    batch = guards.pad(PROMPTS)
    with torch.no_grad():
        before = tiny_loaded.model(**batch).logits
        with watch(tiny_loaded, guard) as monitor:
            assert torch.equal(tiny_loaded.model(**batch).logits, before)
            assert monitor.cases == []


def test_a_policy_is_read_where_a_file_is_named(guard: Guard, tmp_path: Path) -> None:
    guard.save_pretrained(tmp_path / "guard")
    file = tmp_path / "policy.yaml"
    file.write_text("rules: []\non_missing: observe\n", encoding="utf-8")
    wanted = Policy(rules=(), on_missing="observe")
    for policy in (file, str(file), wanted):
        assert Monitor.from_pretrained(tmp_path / "guard", policy).policy == wanted
    assert Monitor.from_pretrained(tmp_path / "guard").policy == Policy.default()
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Monitor.from_pretrained(tmp_path / "guard", "nowhere.yaml")


def test_a_model_on_several_devices_is_refused(tiny_loaded: LoadedModel, guard: Guard) -> None:
    tiny_loaded.model.model.norm.to("meta")
    with pytest.raises(ConfigError, match="lies on cpu, meta, and a guard scores on one device"):
        watch(tiny_loaded, guard)
    assert "generate" not in vars(tiny_loaded.model)
