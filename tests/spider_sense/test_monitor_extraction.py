"""A monitor tells who asks what, and does what the policy says about how they stand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.case import Case
from spider_sense.errors import ConfigError
from spider_sense.extraction.standing import Standing
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Extraction, Policy
from spider_sense.types import Action

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def policy(act: Action = "stop", **changes: Any) -> Policy:
    section = Extraction(watch="observe", limit="verify", act=act)
    return Policy(rules=(), refusal="w23", extraction=section, same_step=True, **changes)


def test_who_asks_what_is_told_once_for_each_prompt(guards: Any, tiny_loaded: LoadedModel) -> None:
    watch, recorder = guards.watch()
    guard = guards.guard(tiny_loaded, guards.many_probes())
    free = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    with Monitor(guard, policy(), extraction=watch).attach(tiny_loaded.model, tiny_loaded.tokenizer):
        told = {"sequence_bias": {(7,): 0.0, (5, 6): 0.0}, "principals": ["ann", None, "cid"]}
        found = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY, **told)
        assert found.tolist() == free.tolist()
        sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 3, "temperature": 0.5}
        tiny_loaded.model.generate(**guards.pad(PROMPTS[:1]), **sampled, principals=["dan"])
    assert [seen.principal for seen in recorder.seen] == ["ann", "unknown", "cid", "dan"]
    assert [list(seen.prompt) for seen in recorder.seen] == [*map(list, PROMPTS), PROMPTS[0]]
    for seen in recorder.seen:
        want = guards.plain_reading(tiny_loaded.model, watch, seen.prompt)
        np.testing.assert_allclose(seen.reading(), want, rtol=1e-5, atol=1e-5)
    asked = recorder.seen[0].asked
    assert (asked.biased, asked.max_tokens, asked.parameters["do_sample"]) == ((5, 6, 7), 6, False)
    assert recorder.seen[3].asked.parameters["temperature"] == 0.5


@pytest.mark.parametrize("level", ["act", "unknown"])
def test_one_that_is_acted_on_is_refused_and_its_neighbours_are_not(
    guards: Any, tiny_loaded: LoadedModel, level: Any, tmp_path: Path
) -> None:
    watch, recorder = guards.watch()
    recorder.standings = {"bob": Standing(level, "why"), "cid": Standing("limit", "level")}
    guard = guards.guard(tiny_loaded, guards.many_probes())
    free = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    changed: list[Case] = []
    with AuditLog(tmp_path / "audit") as audit:
        monitor = Monitor(guard, policy(), audit, on_decision=changed.append, extraction=watch)
        with monitor.attach(tiny_loaded.model, tiny_loaded.tokenizer):
            names = ["ann", "bob", "cid"]
            found = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY, principals=names)
    width = max(map(len, PROMPTS))
    assert found[[0, 2]].tolist() == free[[0, 2]].tolist()
    assert found[1, width : width + 2].tolist() != free[1, width : width + 2].tolist()
    assert [case.decision.action for case in monitor.cases] == ["observe", "stop", "verify"]
    assert sorted(case.request.principal or "" for case in changed) == ["bob", "cid"]
    assert len(recorder.seen) == 3, "who is refused is evidence all the same"
    events = [AuditEvent.model_validate_json(line) for line in (tmp_path / "audit").read_text().splitlines()]
    reasons = [event.reason for event in events if event.event == "action"]
    name = "on_unknown" if level == "unknown" else "act"
    assert f"extraction {level} (why): extraction.{name} says stop" in reasons


def test_each_answer_to_a_prompt_is_refused_where_its_principal_is(guards: Any, tiny_loaded: LoadedModel) -> None:
    watch, recorder = guards.watch()
    recorder.standings = {"bob": Standing("act", "why")}
    monitor = Monitor(guards.guard(tiny_loaded, guards.many_probes()), policy(), extraction=watch)
    sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4}
    with monitor.attach(tiny_loaded.model, tiny_loaded.tokenizer):
        tiny_loaded.model.generate(**guards.pad(PROMPTS[:2]), **sampled, principals=["ann", "bob"])
    assert [case.decision.action for case in monitor.cases] == ["observe"] * 3 + ["stop"] * 3
    assert [seen.principal for seen in recorder.seen] == ["ann", "bob"]


def test_a_policy_and_a_watch_come_together(guards: Any, tiny_loaded: LoadedModel) -> None:
    guard = guards.guard(tiny_loaded, guards.many_probes())
    with pytest.raises(ConfigError, match="nothing watches for it"):
        Monitor(guard, policy()).attach(tiny_loaded.model, tiny_loaded.tokenizer)
    watch, _ = guards.watch()
    with pytest.raises(ConfigError, match=r"add a section such as extraction: \{limit"):
        Monitor(guard, Policy.default(), extraction=watch).attach(tiny_loaded.model, tiny_loaded.tokenizer)
    with pytest.raises(ConfigError, match=r"extraction\.act: .* cannot 'throttle'"):
        Monitor(guard, policy("throttle"), extraction=watch)


def test_continuous_batching_tells_nobody_apart(guards: Any, tiny_loaded: LoadedModel) -> None:
    watch, recorder = guards.watch()
    guard = guards.guard(tiny_loaded, guards.many_probes())
    monitor = Monitor(guard, policy(), extraction=watch)
    with (
        monitor.attach(tiny_loaded.model, tiny_loaded.tokenizer),
        pytest.raises(ConfigError, match="who sends a request"),
    ):
        monitor._guarded.continuous._check()
    assert not recorder.seen
