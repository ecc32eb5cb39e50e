"""The scheduler's side: what is stopped never sees its token, what ends carries its verdict, silence is an error."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spider_sense.errors import SpiderSenseError
from spider_sense.models import LoadedModel
from spider_sense.serving.actor import Actor
from spider_sense.serving.findings import Findings, Note
from spider_sense.serving.settings import ServingSettings
from spider_sense.types import Action

REFUSAL, BREAK = [50, 51, 2], [40]


class Scheduler:
    """As much of vLLM's as the actor touches: requests with their tokens, and an update that appends."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.ended: list[tuple[str, list[int], str]] = []
        self.told: list[Note] = []
        self.patched: list[tuple[str, int]] = []
        self.read_again: list[tuple[str, int]] = []

    def add(self, name: str, output: int = 0, stop: tuple[str, ...] = ()) -> None:
        tokens = [7] * output
        self.requests[name] = SimpleNamespace(
            tokens=tokens,
            num_output_tokens=output,
            is_finished=lambda name=name: name not in self.requests,
            sampling_params=SimpleNamespace(stop=list(stop)),
        )

    def update(self, step: Any, output: Any) -> dict[int, Any]:
        results = []
        for name, place in output.req_id_to_index.items():
            new = output.sampled_token_ids[place]
            if name in self.requests and new:
                finish = "stop" if new[-1] == 2 else None
                results.append(SimpleNamespace(request_id=name, finish_reason=finish, kv_transfer_params={"own": 1}))
                self.requests[name].num_output_tokens += len(new)
                if finish:
                    del self.requests[name]
        return {0: SimpleNamespace(outputs=results)}

    def end(self, _: Any, outputs: dict[int, Any], name: str, tokens: list[int], reason: str) -> None:
        self.ended.append((name, tokens, reason))
        del self.requests[name]
        last = SimpleNamespace(request_id=name, finish_reason="stop", kv_transfer_params=None)
        outputs[0].outputs.append(last)

    def switch_on(self, scheduler: Any, name: str, computed: int) -> None:
        assert scheduler is self
        self.patched.append((name, computed))

    def again(self, scheduler: "Scheduler", name: str) -> bool:
        assert scheduler is self
        self.read_again.append((name, self.requests[name].num_output_tokens))
        return True

    def tell(self, _: dict[int, Any], note: Note) -> None:
        self.told.append(note)


def findings(
    *names: str, stops: tuple[str, ...] = (), patches: tuple[str, ...] = (), throttled: tuple[str, ...] = ()
) -> Findings:
    count = len(names)
    actions: dict[str, Action] = {**dict.fromkeys(stops, "stop"), **dict.fromkeys(patches, "patch")}
    return Findings(
        ids=names,
        peak_BH=np.full((count, 1), np.nan, dtype=np.float32),
        threshold_BH=np.ones((count, 1), dtype=np.float32),
        zone_BH=np.array([[2 if name in stops else 0] for name in names], dtype=np.int8),
        coverage_B3=np.tile(np.array([[5, 4, 0]]), (count, 1)),
        actions=tuple(actions.get(name, "observe") for name in names),
        reasons=tuple("misuse breach" if name in stops else "nothing" for name in names),
        patched_from=tuple(7 if name in patches else None for name in names),
        patches=dict.fromkeys(patches, 9),
        seconds=0.25,
        throttled=throttled,
    )


@pytest.fixture
def settings(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> ServingSettings:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    return ServingSettings(guard=tmp_path / "guard", scores=True)


@pytest.fixture
def actor(settings: ServingSettings) -> tuple[Actor, Scheduler]:
    return acting(settings)


@pytest.fixture
def rereader(settings: ServingSettings) -> tuple[Actor, Scheduler]:
    """One whose policy lets patches begin with the prompt."""
    return acting(settings, again=True)


def acting(settings: ServingSettings, again: bool = False) -> tuple[Actor, Scheduler]:
    scheduler = Scheduler()
    return Actor(
        settings,
        (REFUSAL, BREAK),
        scheduler.end,
        scheduler.tell,
        scheduler.switch_on,
        scheduler.again if again else None,
    ), scheduler


def update(actor: Actor, scheduler: Scheduler, found: Findings | None, **tokens: list[int]) -> dict[int, Any]:
    output = SimpleNamespace(
        req_id_to_index={name: place for place, name in enumerate(tokens)},
        sampled_token_ids=list(tokens.values()),
        prompt_logprobs_dict=dict.fromkeys(tokens, ("some",)),
        prompt_token_id_logprobs_dict={},
    )
    if found is not None:
        output.spider_sense = found
    new = [SimpleNamespace(req_id=name) for name in tokens if name in scheduler.requests and name not in actor._latest]
    step = SimpleNamespace(total_num_scheduled_tokens=len(tokens), scheduled_new_reqs=new)
    result: dict[int, Any] = actor.update(scheduler.update, scheduler, step, output)
    assert not set(found.stops if found else ()) & set(output.prompt_logprobs_dict) or "gone" in tokens
    return result


def test_a_stopped_request_gets_the_refusal_in_place_of_its_token(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    scheduler.add("begun", output=3)
    scheduler.add("fresh")
    scheduler.add("other")
    found = findings("begun", "fresh", "other", stops=("begun", "fresh"))
    outputs = update(one, scheduler, found, begun=[9], fresh=[9], other=[9])
    assert sorted(scheduler.ended) == [
        ("begun", [*BREAK, *REFUSAL], "spider_sense: misuse breach"),
        ("fresh", REFUSAL, "spider_sense: misuse breach"),
    ]
    said = {result.request_id: result.kv_transfer_params for result in outputs[0].outputs}
    assert said["other"] == {"own": 1}
    verdict = said["begun"]["spider_sense"]
    assert (verdict["zone"], verdict["action"]) == ("breach", "stop")
    assert verdict["detectors"] == {"attention": {"zone": "breach", "score": "nan", "threshold": 1.0}}
    assert verdict["coverage"] == {"scored": 5, "cached": 4, "missing": 0}


def test_a_client_is_not_told_what_others_have_sent(settings: ServingSettings) -> None:
    one, scheduler = acting(settings.model_copy(update={"scores": False}))
    scheduler.add("a")
    outputs = update(one, scheduler, findings("a"), a=[2])
    said = outputs[0].outputs[0].kv_transfer_params["spider_sense"]
    assert said["coverage"] == {"scored": 9, "missing": 0}
    assert said["detectors"] == {"attention": {"zone": "clear"}}
    assert scheduler.told[0]["ended"][0]["coverage"] == {"scored": 5, "cached": 4, "missing": 0}, "the metrics are"


def test_what_ends_by_itself_carries_its_latest_verdict(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    scheduler.add("a")
    scheduler.add("gone")
    update(one, scheduler, findings("a"), a=[9])
    del scheduler.requests["gone"]
    outputs = update(one, scheduler, findings("a", "gone", stops=("gone",)), a=[2], gone=[9])
    assert [result.request_id for result in outputs[0].outputs] == ["a"]
    assert outputs[0].outputs[0].kv_transfer_params["own"] == 1
    assert outputs[0].outputs[0].kv_transfer_params["spider_sense"]["zone"] == "clear"
    assert not scheduler.ended
    assert not one._latest


def test_where_the_front_end_may_end_a_request_every_output_carries_a_verdict(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    scheduler.add("a", stop=("END",))
    scheduler.add("b")
    outputs = update(one, scheduler, findings("a", "b"), a=[9], b=[9])
    said = {result.request_id: result.kv_transfer_params for result in outputs[0].outputs}
    assert said["a"]["spider_sense"]["zone"] == "clear"
    assert said["b"] == {"own": 1}


def test_a_step_that_nobody_scored_is_an_error(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    with pytest.raises(SpiderSenseError, match="no guard says anything of it"):
        update(one, scheduler, None, a=[9])
    assert update(one, scheduler, None) == {0: SimpleNamespace(outputs=[])}


def test_every_request_is_counted_once_however_it_ends(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    names = ("finishes", "stopped", "left", "stays")
    for name in names:
        scheduler.add(name)
    update(one, scheduler, findings(*names, stops=("stopped",)), finishes=[2], stopped=[9], left=[9], stays=[9])
    # The step that was on its way already still holds those that have ended.
    update(one, scheduler, findings(*names), finishes=[9], stopped=[9], left=[9], stays=[9])
    del scheduler.requests["left"]
    update(one, scheduler, None)
    assert [[ended["action"] for ended in note["ended"]] for note in scheduler.told] == [
        ["observe", "stop"],
        [],
        ["observe"],
    ]
    assert [note["seconds"] for note in scheduler.told] == [0.25, 0.25, 0.0]
    assert scheduler.told[0]["ended"][1]["zones"] == ["breach"]
    assert scheduler.told[0]["ended"][1]["coverage"] == {"scored": 5, "cached": 4, "missing": 0}
    assert np.isnan(scheduler.told[0]["ended"][1]["margins"]).all()
    update(one, scheduler, None)
    assert len(scheduler.told) == 3


def test_what_the_guard_took_is_told_now_and_then_and_none_of_it_is_lost(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    scheduler.add("a")
    for _ in range(9):
        update(one, scheduler, replace(findings("a"), seconds=0.02), a=[9])
    assert [note["seconds"] for note in scheduler.told] == [pytest.approx(0.06)] * 3
    update(one, scheduler, replace(findings("a"), seconds=0.02), a=[9])
    del scheduler.requests["a"]
    update(one, scheduler, None)
    assert [note["seconds"] for note in scheduler.told[3:]] == [pytest.approx(0.02)]


def test_events_that_were_not_recorded_are_told_with_their_step(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    scheduler.add("a")
    for lost in (0, 2, 0):
        update(one, scheduler, replace(findings("a"), unrecorded=lost), a=[9])
    assert [note.get("unrecorded") for note in scheduler.told] == [None, 2, None]


def test_a_request_that_is_left_in_its_first_step_is_counted(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    output = SimpleNamespace(req_id_to_index={"a": 0}, sampled_token_ids=[[9]], spider_sense=findings("a"))
    step = SimpleNamespace(total_num_scheduled_tokens=1, scheduled_new_reqs=[SimpleNamespace(req_id="a")])
    one.update(scheduler.update, scheduler, step, output)
    assert [len(note["ended"]) for note in scheduler.told] == [1]


def test_what_was_computed_of_a_prompt_is_told_with_the_first_token_of_its_second_reading(
    rereader: tuple[Actor, Scheduler],
) -> None:
    one, scheduler = rereader
    seen = list[Any]()

    def step(prompt_logprobs: dict[str, Any], **tokens: list[int]) -> None:
        output = SimpleNamespace(
            req_id_to_index={name: place for place, name in enumerate(tokens)},
            sampled_token_ids=list(tokens.values()),
            prompt_logprobs_dict=prompt_logprobs,
            prompt_token_id_logprobs_dict={},
            spider_sense=findings(*tokens, patches=tuple(tokens) if not seen else ()),
        )
        step = SimpleNamespace(total_num_scheduled_tokens=9, scheduled_new_reqs=[])
        one.update(lambda step, output: {}, scheduler, step, output)
        seen.append(output.prompt_logprobs_dict)

    for name in ("a", "b", "gone"):
        scheduler.add(name)
    step({"a": "of a", "b": "of b", "gone": "of c"}, a=[9], b=[9], gone=[9])
    del scheduler.requests["gone"]
    step({}, a=[], b=[])
    step({"a": None, "b": "computed again"}, a=[8], b=[8])
    step({}, a=[7], b=[7])
    assert seen == [{}, {}, {"a": "of a", "b": "computed again"}, {}]
    assert not one._kept


def test_a_request_is_patched_once_its_step_is_accounted_for(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    for name in ("suspect", "ends", "other"):
        scheduler.add(name)
    found = findings("suspect", "ends", "other", patches=("suspect", "ends"))
    outputs = update(one, scheduler, found, suspect=[9], ends=[2], other=[9])
    assert scheduler.patched == [("suspect", 9)]
    assert not scheduler.read_again
    assert not scheduler.ended
    said = {result.request_id: result.kv_transfer_params for result in outputs[0].outputs}
    assert (said["ends"]["spider_sense"]["action"], said["ends"]["spider_sense"]["patched_from"]) == ("patch", 7)
    assert "patched_from" not in found.answer(2, ("attention",), "digest", scores=False)


def test_prompts_are_read_again_before_the_scheduler_takes_in_their_tokens(rereader: tuple[Actor, Scheduler]) -> None:
    one, scheduler = rereader
    for name in ("suspect", "ends", "other"):
        scheduler.add(name)
    found = findings("suspect", "ends", "other", patches=("suspect", "ends"))
    update(one, scheduler, found, suspect=[9], ends=[2], other=[9])
    assert scheduler.read_again == [("ends", 0), ("suspect", 0)]
    assert scheduler.patched == [("suspect", 9)]


def test_who_is_to_be_slowed_is_told_with_the_step_even_if_the_request_is_left(actor: tuple[Actor, Scheduler]) -> None:
    one, scheduler = actor
    scheduler.add("a")
    outputs = update(one, scheduler, findings("a", "left", throttled=("team-a", "team-b")), a=[9])
    assert scheduler.told[-1]["throttled"] == ["team-a", "team-b"]
    assert [result.finish_reason for result in outputs[0].outputs] == [None]
    update(one, scheduler, findings("a"), a=[9])
    assert scheduler.told[-1]["throttled"] == []
