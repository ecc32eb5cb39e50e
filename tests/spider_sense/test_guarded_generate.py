"""A guarded ``generate``: what it takes, what it refuses, and that a call which fails leaves nothing open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.case import Case
from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy

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


def slots(monitor: Monitor) -> int:
    return len(monitor._guarded._judge.scorer.stream._free)


def fail(*_: object) -> Any:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["processor", "step", "prompt", "beams", "principals", "eos"])
def test_a_call_that_fails_leaves_nothing_open(guards: Any, tiny_loaded: LoadedModel, free: Any, where: str) -> None:
    guard, model = guards.guard(tiny_loaded, guards.many_probes()), tiny_loaded.model
    wrong: dict[str, dict[str, Any]] = {
        "processor": {"logits_processor": [fail]},
        "prompt": {"stopping_criteria": [fail]},
        "beams": {"num_beams": 2},
        "principals": {"principals": ["a"]},
        "eos": {"eos_token_id": None},
    }
    once = [fail] if where == "step" else []
    monitor = Monitor(guard, Policy.shadow(), on_step=lambda _: once.pop()() if once else None)
    with monitor.attach(model, tiny_loaded.tokenizer):
        before = slots(monitor)
        eos, tiny_loaded.tokenizer.eos_token = tiny_loaded.tokenizer.eos_token, None
        with pytest.raises((RuntimeError, ConfigError)):
            model.generate(**guards.pad(PROMPTS), **GREEDY, **wrong.get(where, {}))
        tiny_loaded.tokenizer.eos_token = eos
        assert slots(monitor) == before
        assert torch.equal(model.generate(**guards.pad(PROMPTS), **GREEDY), free)
        assert slots(monitor) == before


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_beams_are_refused_wherever_they_are_asked_for(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard, where: str
) -> None:
    model, options = tiny_loaded.model, dict(GREEDY)
    if where == "argument":
        options["num_beams"] = 2
    elif where == "config":
        options["generation_config"] = GenerationConfig(num_beams=2)
    else:
        model.generation_config.num_beams = 2
        options["generation_config"] = GenerationConfig(max_new_tokens=2)
    with watch(tiny_loaded, guard), pytest.raises(ConfigError, match="num_beams=2"):
        model.generate(**guards.pad(PROMPTS), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("custom_generate", "someone/else"), ("inputs_embeds", torch.zeros(3, 17, 32)), ("guidance_scale", 1.5)],
)
def test_passes_that_are_not_the_requests_own_are_refused(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard, name: str, value: Any
) -> None:
    with watch(tiny_loaded, guard) as monitor:
        before = slots(monitor)
        with pytest.raises(ConfigError, match=name):
            tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY, **{name: value})
        assert slots(monitor) == before


def test_a_pass_with_more_rows_than_requests_is_an_error(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_loaded.model
    with watch(tiny_loaded, guard) as monitor:
        monkeypatch.setattr(monitor._guarded.generate, "_generate", lambda ids, **_: model(torch.cat((ids, ids))))
        with pytest.raises(SpiderSenseError, match="6 rows for 3 requests"):
            model.generate(**guards.pad(PROMPTS), **GREEDY)


def test_a_model_that_is_served_otherwise_later_is_refused(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    with watch(tiny_loaded, guard):
        tiny_loaded.model.bfloat16()
        with pytest.raises(MismatchError, match=r"bfloat16.*float32"):
            tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)


@pytest.mark.parametrize("asked", [False, True])
def test_prompt_text_is_logged_only_when_asked_for(
    guards: Any, tiny_loaded: LoadedModel, guard: Guard, tmp_path: Path, asked: bool
) -> None:
    with AuditLog(tmp_path / "log", include_text=asked) as log, watch(tiny_loaded, guard, audit=log):
        tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    events = [AuditEvent.model_validate_json(line) for line in (tmp_path / "log").read_text().splitlines()]
    texts = [event.text for event in events if event.event == "open"]
    assert texts == [tiny_loaded.tokenizer.decode(prompt) if asked else None for prompt in PROMPTS]


def test_a_prompt_that_cannot_be_named_is_refused(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    model, ids = tiny_loaded.model, torch.tensor([PROMPTS[0]])
    with watch(tiny_loaded, guard) as monitor:
        before = slots(monitor)
        for arguments in ((), (ids[0],), (ids.tolist(),), (ids, GenerationConfig())):
            with pytest.raises(ConfigError, match="input_ids"):
                model.generate(*arguments, **GREEDY)
        with pytest.raises(ConfigError, match="input_ids"):
            model.generate(inputs_embeds=torch.zeros(1, 4, 32), **GREEDY)
        with pytest.raises(ConfigError, match=r"attention_mask is \[1, 9\], input_ids are \[1, 5\]"):
            model.generate(ids, attention_mask=torch.ones(1, 9, dtype=torch.long), **GREEDY)
        assert slots(monitor) == before


def test_one_guarded_call_at_a_time(guards: Any, tiny_loaded: LoadedModel, guard: Guard, free: torch.Tensor) -> None:
    seen: list[int] = []

    def on_step(cases: Sequence[Case]) -> None:
        with pytest.raises(ConfigError, match="is running"):
            tiny_loaded.model.generate(torch.tensor([PROMPTS[0]]), **GREEDY)
        seen.append(len(cases))

    with watch(tiny_loaded, guard, on_step=on_step):
        output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    assert torch.equal(output, free)
    assert seen
    assert max(seen) == len(PROMPTS)


def test_cases_carry_who_asked(guards: Any, tiny_loaded: LoadedModel, guard: Guard) -> None:
    with watch(tiny_loaded, guard, keep_history=True) as monitor:
        tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY, principals=["a", None, "c"])
    assert [case.request.principal for case in monitor.cases] == ["a", None, "c"]
    for case in monitor.cases:
        positions = [position for position, _ in case.history]
        assert positions == sorted(positions)
        assert positions[0] == case.request.prompt_length - 1
        assert max(score for _, score in case.history) == case.peak[0]
