"""What a served engine tells of requests where extraction is watched for, and what its clients are told."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spider_sense.errors import ConfigError
from spider_sense.extraction.standing import Standing
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.serving.origin import CANARY


def mark_as(engine: Any, name: str, mark: dict[str, Any]) -> None:
    """Write into a request's sampling parameters what else than its principal vLLM's processes tell one another."""
    params = engine.requests[name].params
    params.extra_args = {**(params.extra_args or {}), **mark}


def test_a_second_turn_goes_on_from_the_first_ones_answer_and_is_read_whole(
    tiny_loaded: LoadedModel, guards: Any
) -> None:
    watch, recorder = guards.watch()
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:3]), guards, watch=watch)
    first, answer = [1, 5, *range(10, 20)], list(range(20, 30))
    engine.add("first", first, answer)
    while engine.requests["first"].done < 20:
        engine.step({"first": 5})
    engine.finished.add("first")
    second = [*first, *answer[:8], 40, 41]
    engine.add("second", second, [42])
    engine.step({"second": 100})
    findings, row = engine.found["second"]
    assert findings.coverage_B3[row].tolist() == [len(second) - 20, 20, 0]
    want = guards.plain_reading(tiny_loaded.model, watch, second)
    np.testing.assert_allclose(recorder.seen[-1].reading(), want, rtol=1e-5, atol=1e-5)


def test_of_a_prompt_that_was_not_seen_whole_no_numbers_are_told(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards, watch=watch)
    engine.add("before", [1, 5, *range(10, 20)], [20])
    engine.step({"before": 100})
    engine.guard.kv_states.keep(guards.SIZE, guards.BLOCKS)
    engine.add("after", [1, 5, *range(10, 20)], [20])
    engine.step({"after": 100})
    assert [seen.reading is None for seen in recorder.seen] == [False, True]


def test_what_is_told_of_a_request(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards, watch=watch)
    names = {"a": "team-a", "b": None, "canary": None, "0_c": "team-c", "1_c": "team-c", "1_d": "team-d"}
    for name, principal in names.items():
        engine.add(name, [1, 5, 10, 11], [12, 13], principal)
    marks: dict[str, dict[str, Any]] = {
        "canary": CANARY,
        "0_c": {"spider_sense_choice": [0, 2]},
        "1_c": {"spider_sense_choice": [1, 2]},
    }
    for name, mark in marks.items():
        mark_as(engine, name, mark)
    engine.step(dict.fromkeys(names, 4))
    assert sorted(seen.principal for seen in recorder.seen) == ["team-a", "team-c", "team-d", "unknown"]
    asked = recorder.seen[0].asked
    assert (asked.biased, asked.top_logprobs, asked.max_tokens) == ((5, 7), 4, 0)
    assert asked.parameters == {"temperature": 0.5}
    findings = engine.found["a"][0]
    assert findings.extraction is not None
    assert findings.extraction["requests"] == {"folded": 4}


def test_a_client_is_not_told_how_its_principal_stands(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    recorder.standings = {
        "miner": Standing("act", "own: moved"), "half": Standing("limit", "level"), "lost": Standing("unknown", "down")
    }  # fmt: skip
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards, watch=watch)
    for place, name in enumerate(("miner", "half", "lost", "honest")):
        engine.add(name, [1, 5, *range(10 + place, 20 + place)], [12, 13], name)
    engine.step(dict.fromkeys(("miner", "half", "lost", "honest"), 4))
    assert not engine.found["miner"][0].stops, "before its prompt is read it would never be heard"
    engine.step(dict.fromkeys(("miner", "half", "lost", "honest"), 100))
    findings = engine.found["miner"][0]
    said = {name: findings.answer(row, ("h",), "g", scores=True) for row, name in enumerate(findings.ids)}
    assert [said[name]["action"] for name in ("miner", "half", "lost", "honest")] == ["stop", "observe"] * 2
    assert (said["half"]["reason"], said["miner"]["reason"]) == (said["honest"]["reason"], said["lost"]["reason"])
    marked = replace(findings, patched_from=(0,) * len(findings.ids))
    told = {name: "patched_from" in marked.answer(row, ("h",), "g", True) for row, name in enumerate(marked.ids)}
    assert told == {"miner": False, "half": False, "lost": False, "honest": True}, "nor that it is patched for that"
    assert findings.stops == {"miner": "refused", "lost": "refused"}
    assert findings.hushed == ("half",)
    assert {one["action"] for one in map(findings.ended, range(4))} == {"stop", "observe", "omit_reasoning"}
    assert sorted(seen.principal for seen in recorder.seen) == ["half", "honest", "lost", "miner"]
    cases = {name: served.case for name, served in engine.guard._running.items()}
    assert cases["half"].decision.reason == "extraction limit (level): extraction.limit says omit_reasoning"
    assert cases["lost"].decision.reason == "extraction unknown (down): extraction.on_unknown says stop"


def test_how_a_principal_stands_holds_for_each_choice_of_an_answer(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    recorder.standings = {"miner": Standing("act", "own: moved"), "unknown": Standing("act", "own: moved")}
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards, watch=watch)
    names = ["0_chat", "1_chat", "2_chat", "spider_sense canary 0"]
    for place, name in enumerate(names):
        engine.add(name, [1, 5, *range(10, 20)], [12, 13], "miner" if "chat" in name else None)
        mark_as(engine, name, {"spider_sense_choice": [place, 3]} if "chat" in name else CANARY)
    engine.step(dict.fromkeys(names, 100))
    assert engine.found["0_chat"][0].stops == dict.fromkeys(names[:3], "refused"), "and a canary is nobody's"
    assert [seen.principal for seen in recorder.seen] == ["miner"], "they are one question"


def test_another_guard_leaves_the_watch_as_it_was(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    first, second = (guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=seed),)) for seed in (1, 2))
    engine = guards.Engine(tiny_loaded, first, guards, watch=watch)
    prompt = [1, 5, *range(10, 20)]
    for name, which in (("before", first), ("after", second)):
        engine.which = which
        if which is second:
            with pytest.raises(ConfigError, match="the policy does not say what to do about it"):
                engine.guard.exchange(second, Policy.default())
            engine.guard.exchange(second, guards.WATCHING)
        engine.add(name, prompt, [20], name)
        engine.step({name: 100})
        engine.check(name, guards)
        want = guards.plain_reading(tiny_loaded.model, watch, prompt)
        np.testing.assert_allclose(recorder.seen[-1].reading(), want, rtol=1e-5, atol=1e-5)
        engine.finished = {name}
        engine.step({})
        engine.cache.clear()
    assert [seen.principal for seen in recorder.seen] == ["before", "after"]
