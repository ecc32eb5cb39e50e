"""The worker's side of a served guard, driven by a scheduler that does to it whatever vLLM's may do."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.errors import SpiderSenseError
from spider_sense.judge import Judge
from spider_sense.lost_events import LostEvents
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy, Rule
from spider_sense.recorder import Recorder
from spider_sense.scoring import Scorer
from spider_sense.serving import engine_guard
from spider_sense.serving.engine_guard import EngineGuard


def prompt_of(draw: np.random.Generator, shared: Sequence[int], length: int) -> list[int]:
    return [1, 5, *shared, *draw.integers(3, 60, length).tolist()]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16))
def test_whatever_the_scheduler_does_the_score_is_that_of_a_plain_pass(
    tiny_loaded: LoadedModel, guards: Any, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    which = guards.guard(tiny_loaded, guards.many_probes())
    watch, recorder = guards.watch()
    engine = guards.Engine(tiny_loaded, which, guards, second_runner=bool(seed % 2), watch=watch)
    shared = draw.integers(3, 60, 9).tolist()
    for index in range(4):
        prompt = prompt_of(draw, shared[: draw.integers(0, 10)], int(draw.integers(2, 12)))
        engine.add(f"r{index}", prompt, draw.integers(3, 60, 8).tolist())
    for _ in range(16):
        open_ones = [name for name, one in engine.requests.items() if one.done < len(one.ids) - 1]
        if not open_ones:
            break
        chosen = draw.permutation(open_ones)[: draw.integers(1, 4)].tolist()
        if draw.random() < 0.15 and engine.requests[chosen[0]].state == "running":
            engine.preempt(chosen[0])
        drafts = {name: int(draw.integers(0, 3)) for name in chosen}
        engine.step({name: int(draw.integers(1, 8)) for name in chosen}, drafts)
    for name in engine.found:
        engine.check(name, guards)
    read = [tuple(seen.prompt) for seen in recorder.seen]
    done = [one for one in engine.requests.values() if one.furthest >= one.prompt]
    assert sorted(read) == sorted(tuple(one.ids[: one.prompt]) for one in done)
    for seen in recorder.seen:
        want = guards.plain_reading(tiny_loaded.model, watch, seen.prompt)
        np.testing.assert_allclose(seen.reading(), want, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_the_steps_are_refused(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards)
    step = SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id="a",
                prompt_token_ids=[1, 5, 6],
                block_ids=([0],),
                num_computed_tokens=0,
                lora_request=None,
                sampling_params=None,
            )
        ],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[]),
        total_num_scheduled_tokens=3,
        scheduled_spec_decode_tokens={},
    )
    engine.guard.begin(step)
    with pytest.raises(SpiderSenseError, match="packed 4 rows for a step of 3 tokens"):
        engine.guard.rows(["a"], [0, 4], [0])
    step.scheduled_new_reqs = []
    step.scheduled_cached_reqs = SimpleNamespace(
        req_ids=["ghost"], new_block_ids=[None], resumed_req_ids=set(), num_computed_tokens=[0]
    )
    with pytest.raises(SpiderSenseError, match="ghost runs, but the guard never saw it begin"):
        engine.guard.begin(step)


def test_finished_requests_give_their_slots_back(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards, cached=False)
    free = len(engine.guard.judge.scorer.stream._free)
    for index in range(3):
        engine.add(f"r{index}", [1, 5, 6, 7], [8, 9])
    engine.step({"r0": 2, "r1": 4, "r2": 4})
    engine.preempt("r0")
    engine.step({"r0": 1})
    assert len(engine.guard.judge.scorer.stream._free) == free - 4, "a preempted one has a second slot for a while"
    engine.finished = {"r0", "r1"}
    engine.step({"r2": 1})
    assert len(engine.guard.judge.scorer.stream._free) == free - 1
    engine.guard.close()
    assert len(engine.guard.judge.scorer.stream._free) == free


def test_what_the_metrics_hear_of_a_request(
    tiny_loaded: LoadedModel, guards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Folding looks at the clock twice, and so does settling.
    monkeypatch.setattr(engine_guard, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
    engine.add("a", [1, 5, 10, 11], [12, 13])
    engine.step({"a": 2})
    findings, row = engine.found["a"]
    assert findings.seconds == 2
    assert set(findings.ended(row)["margins"]) == {-np.inf}
    engine.step({"a": 3})
    findings, row = engine.found["a"]
    ended = findings.ended(row)
    assert ended["margins"] == (findings.peak_BH[row] - findings.threshold_BH[row]).tolist()
    # A detector of the response has read nothing yet.
    assert np.isfinite(ended["margins"]).sum() == len(ended["margins"]) - 1
    zones = np.array(ended["zones"])
    assert ((zones == "breach") == (np.array(ended["margins"]) >= 0)).all()
    assert ended["coverage"] == {"scored": 4, "cached": 0, "missing": 0}


def test_another_guard_takes_over_between_requests(tiny_loaded: LoadedModel, guards: Any) -> None:
    def probes(seed: int) -> Any:
        return guards.probe("one", "mean", "resid.0", seed=seed), guards.probe("two", "max", "resid.1", seed=seed + 1)

    first, second = (guards.guard(tiny_loaded, probes(seed)) for seed in (1, 3))
    engine = guards.Engine(tiny_loaded, first, guards)
    prompt = [1, 5, *range(10, 20)]
    for name, which in (("a", first), ("b", second), ("c", first)):
        engine.which = which
        engine.add(name, prompt, [20])
        engine.step({name: 100})
        engine.check(name, guards)
        with pytest.raises(SpiderSenseError, match="1 requests still run"):
            engine.guard.exchange(second, Policy.default())
        engine.finished = {name}
        engine.step({})
        # The engine empties its prefix cache when it is paused.
        engine.cache.clear()
        if name == "a":
            engine.guard.exchange(second, Policy.default())
            assert engine.guard.judge.policy == Policy.default()
        elif name == "b":
            engine.guard.restore()
            assert engine.guard.judge.policy == Policy.shadow()


@pytest.mark.parametrize("second_runner", [False, True])
def test_a_prompt_that_is_read_again_is_scored_once_and_loses_the_token_that_followed_it(
    tiny_loaded: LoadedModel, guards: Any, second_runner: bool
) -> None:
    which = guards.guard(tiny_loaded, guards.many_probes()[:1])
    engine, prompt = guards.Engine(tiny_loaded, which, guards, second_runner=second_runner), [1, 5, *range(10, 20)]
    engine.add("a", prompt, [50])
    engine.step({"a": 100})
    assert engine.guard._running["a"].tokens == [*prompt, 50]
    first, peak = engine.requests["a"], engine.found["a"][0].peak_BH.copy()
    # Under the patch it answers otherwise, and begins with none of the blocks of before.
    engine.add("a", prompt, range(20, 30))
    engine.requests["a"].state, engine.requests["a"].params = "resumed", first.params
    for hidden_TD in engine.requests["a"].hidden.values():
        hidden_TD[: len(prompt)] *= -3
    engine.cache.clear()
    engine.patched["a"] = 0
    for rows in (5, 7):
        engine.step({"a": rows})
        np.testing.assert_array_equal(engine.found["a"][0].peak_BH, peak)
    findings, row = engine.found["a"]
    assert findings.coverage_B3[row].tolist() == [len(prompt), 0, 0], "known from the first reading"
    while engine.requests["a"].done < 20:
        engine.step({"a": 4})
    engine.check("a", guards)
    findings, row = engine.found["a"]
    assert findings.patched_from[row] == 0
    served = engine.guard._running["a"]
    assert served.tokens == [*prompt, *range(20, 29)]
    # What it computed under the patch it takes up again after a preemption.
    engine.preempt("a")
    engine.step({"a": 100})
    assert served.again is None
    assert served.tokens == [*prompt, *range(20, 30)]


class FullFor:
    """As much of an audit log as a judge touches, which takes no event of one request."""

    def __init__(self, name: str) -> None:
        self.name, self.taken = name, list[tuple[str, str]]()

    def write(self, event: AuditEvent) -> None:
        if event.request == self.name:
            raise OSError("No space left on device")
        self.taken.append((event.request, event.event))


def test_a_request_that_cannot_be_recorded_is_stopped_and_no_other(tiny_loaded: LoadedModel, guards: Any) -> None:
    which = guards.guard(tiny_loaded, guards.many_probes()[:1])
    engine = guards.Engine(tiny_loaded, which, guards, cached=False)
    log: Any = FullFor("a")
    engine.guard = EngineGuard(Judge(which, Policy.default(), log, lost=LostEvents()))
    for name in "ab":
        engine.add(name, [1, 5, 10, 11], [12, 13])
    # Before its prompt is read.
    engine.step({"a": 2, "b": 2})
    findings, _ = engine.found["a"]
    assert list(findings.stops) == ["a"]
    assert "could not be recorded" in findings.stops["a"]
    assert findings.unrecorded == 1
    engine.finished = {"a"}
    engine.step({"b": 100})
    engine.check("b", guards)
    assert engine.found["b"][0].stops == {}
    assert engine.found["b"][0].unrecorded == 1, "its end was not recorded either"
    engine.finished = {"b"}
    engine.step({})
    assert log.taken == [("b", "open"), ("b", "close")]
    scorer = engine.guard.judge.scorer
    assert len(scorer.stream._free) == len(scorer.stream._state)


def throttling(tiny_loaded: LoadedModel, guards: Any, *exempt: str) -> Any:
    """Return an engine that breaches with every token, and throttles for that."""
    which = guards.guard(tiny_loaded, guards.many_probes()[:1], guards.calibration(-1e9, -1e9))
    engine = guards.Engine(tiny_loaded, which, guards, cached=False)
    rules = (Rule(detector="*", zone="breach", action="throttle"),)
    engine.guard = EngineGuard(Judge(which, Policy(rules=rules), exempt=exempt))
    return engine


def test_the_principal_of_a_throttled_request_is_told_once(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = throttling(tiny_loaded, guards)
    for name, principal in {"a": "team-a", "b": None, "c": "team-c"}.items():
        engine.add(name, [1, 5, 10, 11], [12, 13], principal)
    engine.step({"a": 4, "b": 4, "c": 2})
    assert [engine.found[name][0].actions[engine.found[name][1]] for name in "abc"] == ["throttle"] * 2 + ["observe"]
    assert sorted(engine.found["a"][0].throttled) == ["team-a", "unknown"]
    engine.step({"a": 1, "b": 1, "c": 2})
    assert engine.found["a"][0].throttled == ("team-c",)
    assert not engine.found["a"][0].stops, "the request itself goes on"


def test_an_exempt_principal_is_scored_and_never_acted_on(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = throttling(tiny_loaded, guards, "red-team")
    for name, principal in {"a": "red-team", "b": "Red-Team", "c": None}.items():
        engine.add(name, [1, 5, 10, 11], [12, 13], principal)
    engine.step({"a": 4, "b": 4, "c": 4})
    said = {name: engine.found[name][0].answer(engine.found[name][1], ("h",), "g", scores=False) for name in "abc"}
    assert (said["a"]["zone"], said["a"]["action"]) == ("breach", "observe")
    assert said["a"]["reason"] == "its principal is exempt: nothing is done about it"
    assert said["a"]["detectors"] == said["b"]["detectors"]
    assert [said[name]["action"] for name in "bc"] == ["throttle", "throttle"]
    assert sorted(engine.found["a"][0].throttled) == ["Red-Team", "unknown"]


def test_requests_that_decode_are_folded_at_once_beside_a_prompt(
    tiny_loaded: LoadedModel, guards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards, second_runner=True)
    decoded: list[int] = []
    inner = Scorer.decode

    def decode(scorer: Scorer, logits_TC: torch.Tensor, row_B: np.ndarray, requests: Any, block_B: Any) -> None:
        decoded.append(len(requests))
        inner(scorer, logits_TC, row_B, requests, block_B)

    monkeypatch.setattr(Scorer, "decode", decode)
    for first, name in enumerate(("a", "b", "c")):
        engine.add(name, [1, 5, *range(10 + first, 16 + first)], range(20, 28))
    engine.step({"a": 100, "b": 100})
    assert decoded == []
    engine.step({"a": 1, "b": 1, "c": 5})
    engine.step({"a": 1, "b": 1, "c": 5})
    engine.step({"a": 1, "b": 1, "c": 1})
    assert decoded == [2, 2, 3]
    for name in ("a", "b", "c"):
        engine.check(name, guards)


def test_what_an_engine_runs_to_warm_up_is_nobodys_request(
    tiny_loaded: LoadedModel, guards: Any, tmp_path: Path
) -> None:
    watching, told = guards.watch()
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards, watch=watching)
    log = tmp_path / "audit.jsonl"
    with AuditLog(log) as audit:
        engine.guard.judge.recorder = Recorder(audit)
        with engine.guard.warming():
            for name in ("_warmup_0_", "_warmup_1_"):
                engine.add(name, [1, 5, *range(10, 16)], range(20, 24))
            engine.step({"_warmup_0_": 100, "_warmup_1_": 100})
            engine.step({"_warmup_0_": 1, "_warmup_1_": 1})
        assert not log.exists() or not log.read_text()
        assert told.seen == []
        engine.add("real", [1, 5, *range(10, 16)], range(20, 24))
        engine.step({"real": 100})
    assert [json.loads(line)["request"] for line in log.read_text().splitlines()] == ["real"]
    assert len(told.seen) == 1


def test_what_is_told_of_a_step_is_of_that_step_where_the_next_is_folded_before(
    tiny_loaded: LoadedModel, guards: Any
) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
    engine.looks_ahead = True
    engine.add("a", [1, 5, *range(10, 16)], range(20, 28))
    covered = []
    for _ in range(3):
        engine.step({"a": 100})
        if "a" in engine.found:
            findings, row = engine.found["a"]
            covered.append(findings.coverage_B3[row].tolist())
    assert covered == [[8, 0, 0], [9, 0, 0]]
    engine.settle()
    engine.check("a", guards)


def test_a_row_beyond_the_end_of_a_request_is_not_judged(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> None:
    engine = guards.Engine(
        tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1], guards.calibration(-1e9, -1e9)), guards
    )
    engine.looks_ahead = True
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        engine.guard.judge.recorder = Recorder(audit)
        engine.add("a", [1, 5, *range(10, 16)], range(20, 28))
        engine.step({"a": 100})
        engine.finished = {"a"}
        engine.add("b", [1, 6, *range(30, 36)], range(20, 28))
        engine.step({"b": 100})
        engine.settle()
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["request"] == "a"] == ["open", "close"]
    assert [event["event"] for event in events if event["request"] == "b"] == ["open", "verdict"]
