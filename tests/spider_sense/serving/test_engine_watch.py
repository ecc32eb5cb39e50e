"""What a served engine tells of requests where extraction is watched for, and what its clients are told."""

from typing import Any

import numpy as np

from spider_sense.extraction.standing import Standing
from spider_sense.models import LoadedModel


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
    engine.guard.judge.scorer.blocks.forget()
    engine.add("after", [1, 5, *range(10, 20)], [20])
    engine.step({"after": 100})
    assert [seen.reading is None for seen in recorder.seen] == [False, True]


def test_what_is_told_of_a_request(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards, watch=watch)
    names = {"a": "team-a", "b": None, "spider_sense canary 0": None, "0_c": "team-c", "1_c": "team-c"}
    for name, principal in names.items():
        engine.add(name, [1, 5, 10, 11], [12, 13], principal)
    engine.step(dict.fromkeys(names, 4))
    assert sorted(seen.principal for seen in recorder.seen) == ["team-a", "team-c", "unknown"]
    asked = recorder.seen[0].asked
    assert (asked.biased, asked.top_logprobs, asked.max_tokens) == ((5, 7), 4, 0)
    assert asked.parameters == {"temperature": 0.5}
    findings = engine.found["a"][0]
    assert findings.extraction is not None
    assert findings.extraction["requests"] == {"folded": 3}


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
    assert findings.stops == {"miner": "refused", "lost": "refused"}
    assert findings.hushed == ("half",)
    assert {one["action"] for one in map(findings.ended, range(4))} == {"stop", "observe", "omit_reasoning"}
    assert sorted(seen.principal for seen in recorder.seen) == ["half", "honest", "lost", "miner"]
    cases = {name: served.case for name, served in engine.guard._served.items()}
    assert cases["half"].decision.reason == "extraction limit (level): extraction.limit says omit_reasoning"
    assert cases["lost"].decision.reason == "extraction unknown (down): extraction.on_unknown says stop"
