"""What is known at the end of KV blocks: who goes on from there, and what counts as missing."""

from typing import Any

from spider_sense.models import LoadedModel
from spider_sense.policy import Policy


def test_copies_that_begin_in_one_step_share_what_it_fills(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
    prompt = [1, 5, *range(10, 21)]
    for name in ("a", "b", "c"):
        engine.add(name, prompt, [30, 31])
    engine.step({"a": 100, "b": 100, "c": 100})
    for name, cached in {"a": 0, "b": 12, "c": 12}.items():
        engine.check(name, guards)
        findings, row = engine.found[name]
        assert findings.coverage_B3[row].tolist() == [13 - cached, cached, 0]


def test_a_request_after_a_conversation_goes_on_from_it(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
    first = [1, 5, *range(10, 20)]
    engine.add("first", first, range(20, 30))
    while engine.requests["first"].done < 20:
        engine.step({"first": 5})
    engine.finished = {"first"}
    engine.add("second", [*first, *range(20, 28), 7, 8, 9], range(30, 36))
    while engine.requests["second"].done < 26:
        engine.step({"second": 100})
    engine.check("second", guards)
    findings, row = engine.found["second"]
    assert findings.coverage_B3[row].tolist() == [6, 20, 0]


def test_cached_tokens_that_nothing_is_known_of_are_missing(tiny_loaded: LoadedModel, guards: Any) -> None:
    which = guards.guard(tiny_loaded, guards.many_probes()[:1])
    engine = guards.Engine(tiny_loaded, which, guards)
    engine.add("before", [1, 5, *range(10, 20)], [20])
    engine.step({"before": 100})
    assert engine.guard.judge.scorer.blocks is not None
    engine.guard.kv_states.keep(guards.SIZE, guards.BLOCKS)
    engine.add("after", [1, 5, *range(10, 20)], [20])
    engine.step({"after": 100})
    findings, row = engine.found["after"]
    assert findings.coverage_B3[row].tolist() == [4, 0, 8]
    engine.guard.judge.policy = Policy.default()
    engine.finished = {"after"}
    engine.add("again", [1, 5, *range(10, 20)], [20])
    engine.step({"again": 100})
    findings, row = engine.found["again"]
    assert "again" in findings.stops
    assert not findings.throttled
    assert findings.answer(row, ("attention",), "digest", scores=False)["action"] == "stop"


def test_of_the_blocks_that_another_guard_filled_nothing_is_known(tiny_loaded: LoadedModel, guards: Any) -> None:
    first, second = (guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=seed),)) for seed in (1, 2))
    engine = guards.Engine(tiny_loaded, first, guards)
    prompt = [1, 5, *range(10, 20)]
    engine.add("a", prompt, [20])
    engine.step({"a": 100})
    engine.finished = {"a"}
    engine.step({})
    engine.guard.exchange(second, Policy.default())
    engine.add("b", prompt, [20])
    engine.step({"b": 100})
    findings, row = engine.found["b"]
    assert findings.coverage_B3[row].tolist() == [4, 0, 8]
    engine.cache.clear()
    for name in ("c", "d"):
        engine.add(name, prompt, [20])
        engine.step({name: 100})
    findings, row = engine.found["d"]
    assert findings.coverage_B3[row].tolist() == [4, 8, 0]


def test_the_state_of_patched_tokens_is_lent_to_nobody_else(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = guards.Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards)
    prompt, answer = [1, 5, *range(10, 16)], list(range(20, 32))
    engine.add("patched", prompt, answer)
    engine.step({"patched": 100})
    findings, row = engine.found["patched"]
    assert findings.patched_from[row] is None
    engine.patched["patched"] = 10
    while engine.requests["patched"].done < 18:
        engine.step({"patched": 1})
    findings, row = engine.found["patched"]
    assert findings.patched_from[row] == 10
    assert findings.answer(row, ("attention",), "digest", scores=False)["patched_from"] == 10
    # Preempted, it takes up its own blocks again.
    engine.preempt("patched")
    engine.step({"patched": 100})
    served = engine.guard._running["patched"]
    assert served.again is None, "the state after its own blocks was known"
    # An engine would have to mix up its blocks to let another request begin with them.
    engine.add("later", [*prompt, *answer], [40])
    engine.step({"later": 100})
    findings, row = engine.found["later"]
    assert findings.coverage_B3[row].tolist() == [4, 0, 16]
