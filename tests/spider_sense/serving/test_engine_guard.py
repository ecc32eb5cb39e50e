"""The worker's side of a served guard, driven by a scheduler that does to it whatever vLLM's may do."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spider_sense.errors import SpiderSenseError
from spider_sense.extraction.standing import Standing
from spider_sense.fingerprint import serving_config
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel
from spider_sense.policy import Extraction, Policy, Rule
from spider_sense.serving import engine_guard
from spider_sense.serving.checks import exchange, graph_of
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.findings import Findings
from spider_sense.serving.principals import name_principal
from spider_sense.serving.settings import ServingSettings

SIZE, BLOCKS = 4, 64
WATCHING = Policy(
    rules=(), on_missing="observe", extraction=Extraction(watch="observe", limit="omit_reasoning", act="stop")
)


class Engine:
    """As much of an engine as the guard sees: requests, blocks with a prefix cache, steps of any shape."""

    def __init__(
        self,
        what: LoadedModel,
        guard: Any,
        helpers: Any,
        cached: bool = True,
        second_runner: bool = False,
        watch: Any = None,
    ) -> None:
        self.second_runner = second_runner
        self.what, self.helpers, self.which = what, helpers, guard
        policy = Policy.shadow() if watch is None else WATCHING
        self.guard = EngineGuard(Judge(guard, policy, watch=watch), longest=1000)
        if cached:
            self.guard.keep_blocks(SIZE, BLOCKS)
        self.sites = self.guard.judge.bank.sites
        self.cache: dict[tuple[int, ...], int] = {}
        self.free = list(range(BLOCKS))
        self.requests: dict[str, SimpleNamespace] = {}
        self.finished: set[str] = set()
        self.found: dict[str, tuple[Findings, int]] = {}
        self.patched: dict[str, int] = {}

    def add(self, name: str, prompt: Sequence[int], answer: Sequence[int], principal: str | None = None) -> None:
        """Let a request wait: its prompt, what it will generate, and who sends it."""
        ids = [*prompt, *answer]
        hidden = self.helpers.hidden_states(self.what.model, ids, self.sites)
        self.requests[name] = SimpleNamespace(
            ids=ids, prompt=len(prompt), known=len(prompt), done=0, furthest=0, blocks=[], state="new", hidden=hidden
        )
        self.requests[name].params = SimpleNamespace(
            extra_args=None, max_tokens=1000 - len(prompt), logit_bias={7: 1.0, 5: -1.0}, logprobs=4, temperature=0.5
        )
        name_principal(self.requests[name].params, principal)

    def preempt(self, name: str) -> None:
        request = self.requests[name]
        request.state, request.done, request.blocks = "resumed", 0, []

    def step(self, plan: dict[str, int], drafts: dict[str, int] | None = None) -> None:
        """Compute some tokens of some requests.

        Args:
            plan: most tokens of each; a draft is on top of them.
            drafts: of requests that decode, how many wrong tokens are drafted after the certain one.
        """
        new, again, counts = (
            [],
            SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set(), num_computed_tokens=[]),
            {},
        )
        for name, most in plan.items():
            request = self.requests[name]
            extra = (drafts or {}).get(name, 0) if request.done == request.known - 1 >= request.prompt else 0
            if request.state != "running":
                request.done = self._hit(request)
            count = min(most, request.known - request.done) + extra
            blocks = self._blocks(request, request.done + count)
            if request.state == "new" or (self.second_runner and request.state == "resumed"):
                new.append(
                    SimpleNamespace(
                        req_id=name,
                        prompt_token_ids=request.ids[: request.prompt],
                        block_ids=(request.blocks,),
                        num_computed_tokens=request.done,
                        lora_request=None,
                        sampling_params=request.params,
                    )
                )
            else:
                again.req_ids.append(name)
                resumed = request.state == "resumed"
                again.new_block_ids.append((list(request.blocks),) if resumed else (blocks,) if blocks else None)
                again.num_computed_tokens.append(request.done)
                again.resumed_req_ids |= {name} if resumed else set()
            request.state, counts[name] = "running", (count, extra)
            # As vLLM does, blocks are lent before they are filled, within one step too.
            for place in range((request.done + count - extra) // SIZE):
                self.cache.setdefault(tuple(request.ids[: (place + 1) * SIZE]), request.blocks[place])
        total = sum(count for count, _ in counts.values())
        self.guard.begin(
            SimpleNamespace(
                spider_sense_patched={name: self.patched[name] for name in plan if name in self.patched},
                finished_req_ids=self.finished,
                scheduled_new_reqs=new,
                scheduled_cached_reqs=again,
                total_num_scheduled_tokens=total,
                scheduled_spec_decode_tokens={name: [0] * extra for name, (_, extra) in counts.items() if extra},
            )
        )
        self.finished = set()
        if counts:
            self._run(counts, total)

    def _run(self, counts: dict[str, tuple[int, int]], total: int) -> None:
        order = sorted(counts)[::-1]  # not the scheduler's
        bank = self.guard.judge.bank
        for site in self.sites:
            rows = []
            for name in order:
                request, (count, extra) = self.requests[name], counts[name]
                real = request.hidden[site][request.done : request.done + count - extra]
                rows += [real, torch.randn(extra, real.shape[1]) * 50]
            bank.tap(site)(torch.cat(rows))
        starts = np.cumsum([0, *(counts[name][0] for name in order)])
        self.guard.rows(order, starts.tolist(), [self.requests[name].done for name in order])
        accepted = {}
        for name in order:
            request, (count, extra) = self.requests[name], counts[name]
            request.done += count - extra
            request.furthest = max(request.furthest, request.done)
            ended = request.done == request.known
            accepted[name] = request.ids[request.known : request.known + 1] if ended else []
            request.known += len(accepted[name])
        findings = self.guard.settle(self.guard.fold(), accepted)
        self.found |= {name: (findings, row) for row, name in enumerate(findings.ids)}

    def _hit(self, request: SimpleNamespace) -> int:
        """Let a request begin with blocks that hold its own first tokens."""
        request.blocks = []
        for end in range(SIZE, request.known, SIZE):
            block = self.cache.get(tuple(request.ids[:end]))
            if block is None:
                break
            request.blocks.append(block)
        return len(request.blocks) * SIZE

    def _blocks(self, request: SimpleNamespace, tokens: int) -> list[int]:
        more = [self.free.pop() for _ in range(-(-tokens // SIZE) - len(request.blocks))]
        request.blocks += more
        return more

    def check(self, name: str, helpers: Any) -> None:
        """Compare what was found last with a plain pass over the tokens that were computed."""
        findings, row = self.found[name]
        request = self.requests[name]
        ids = request.ids[: request.furthest]
        want_H = helpers.offline_peak(self.which, self.what.model, ids, request.prompt)
        torch.testing.assert_close(torch.from_numpy(findings.peak_BH[row]), want_H, rtol=1e-5, atol=1e-5)
        scored, cached, missing = findings.coverage_B3[row].tolist()
        assert (scored + cached, missing) == (request.furthest, 0)


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
    engine = Engine(tiny_loaded, which, guards, second_runner=bool(seed % 2), watch=watch)
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


def test_a_second_turn_goes_on_from_the_first_ones_answer_and_is_read_whole(
    tiny_loaded: LoadedModel, guards: Any
) -> None:
    watch, recorder = guards.watch()
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:3]), guards, watch=watch)
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


def test_what_is_told_of_a_request(tiny_loaded: LoadedModel, guards: Any) -> None:
    watch, recorder = guards.watch()
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards, watch=watch)
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
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards, watch=watch)
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


def test_copies_that_begin_in_one_step_share_what_it_fills(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
    prompt = [1, 5, *range(10, 21)]
    for name in ("a", "b", "c"):
        engine.add(name, prompt, [30, 31])
    engine.step({"a": 100, "b": 100, "c": 100})
    for name, cached in {"a": 0, "b": 12, "c": 12}.items():
        engine.check(name, guards)
        findings, row = engine.found[name]
        assert findings.coverage_B3[row].tolist() == [13 - cached, cached, 0]


def test_a_request_after_a_conversation_goes_on_from_it(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
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
    engine = Engine(tiny_loaded, which, guards)
    engine.add("before", [1, 5, *range(10, 20)], [20])
    engine.step({"before": 100})
    assert engine.guard.judge.scorer.blocks is not None
    engine.guard.judge.scorer.blocks.forget()
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


def test_rows_that_are_not_the_steps_are_refused(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards)
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
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards, cached=False)
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
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()), guards)
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
    engine = Engine(tiny_loaded, first, guards)
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


def test_of_the_blocks_that_another_guard_filled_nothing_is_known(tiny_loaded: LoadedModel, guards: Any) -> None:
    first, second = (guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=seed),)) for seed in (1, 2))
    engine = Engine(tiny_loaded, first, guards)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "resid.1"}, "the model was compiled with the probes 1/one:resid.0, the guard has 1/one:resid.1"),
        ({"kind": "attention"}, "write other columns"),
        ({"template": True}, "made for the template"),
        ({"serving": True}, "uncertified serving configuration"),
        ({"policy": True}, "the vLLM engine cannot 'steer'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_guard_that_does_not_fit_is_refused_and_the_old_one_stays(
    tiny_loaded: LoadedModel, guards: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    first = guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=1),))
    engine = Engine(tiny_loaded, first, guards)
    probe = guards.probe("one", change.get("kind", "mean"), change.get("site", "resid.0"), seed=2)
    other = guards.guard(tiny_loaded, (probe,))
    if "template" in change:
        template = other.manifest.template.model_copy(update={"tail": 3})
        other = replace(other, manifest=other.manifest.model_copy(update={"template": template}))
    other.save_pretrained(tmp_path / "other")
    told = {"guard": str(tmp_path / "other"), "graph": graph_of(first, ServingSettings(guard=tmp_path))}
    if "policy" in change:
        (tmp_path / "policy.yaml").write_text("rules: []\non_missing: steer\nsteer: {vector: calm, strength: 1}\n")
        told["policy"] = str(tmp_path / "policy.yaml")
    serving = serving_config(tiny_loaded.model)
    if "serving" in change:
        serving = serving.model_copy(update={"dtype": "bfloat16"})
    refused = exchange(engine.guard, told, serving)
    assert refused is not None
    assert message in refused
    assert engine.guard.judge.guard is first
    engine.add("a", [1, 5, *range(10, 20)], [20])
    engine.step({"a": 100})
    engine.check("a", guards)


def test_a_guard_that_fits_is_taken_from_its_folder(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> None:
    first, second = (guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=seed),)) for seed in (1, 2))
    engine = Engine(tiny_loaded, first, guards)
    second.save_pretrained(tmp_path / "second")
    told = {"guard": str(tmp_path / "second"), "graph": graph_of(first, ServingSettings(guard=tmp_path))}
    assert exchange(engine.guard, told, serving_config(tiny_loaded.model)) is None
    assert engine.guard.judge.guard.digest == Guard.from_pretrained(tmp_path / "second").digest


def test_the_state_of_patched_tokens_is_lent_to_nobody_else(tiny_loaded: LoadedModel, guards: Any) -> None:
    engine = Engine(tiny_loaded, guards.guard(tiny_loaded, guards.many_probes()[:1]), guards)
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
    served = engine.guard._served["patched"]
    assert served.again is None, "the state after its own blocks was known"
    # An engine would have to mix up its blocks to let another request begin with them.
    engine.add("later", [*prompt, *answer], [40])
    engine.step({"later": 100})
    findings, row = engine.found["later"]
    assert findings.coverage_B3[row].tolist() == [4, 0, 16]


def throttling(tiny_loaded: LoadedModel, guards: Any, *exempt: str) -> Engine:
    """Return an engine that breaches with every token, and throttles for that."""
    which = guards.guard(tiny_loaded, guards.many_probes()[:1], guards.calibration(-1e9, -1e9))
    engine = Engine(tiny_loaded, which, guards, cached=False)
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
