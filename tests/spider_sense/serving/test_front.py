"""What a process that answers clients keeps of the guard follows a reload."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.policy import Extraction, Policy, Rule, Throttle
from spider_sense.serving.about import about
from spider_sense.serving.findings import Note
from spider_sense.serving.front import Front
from spider_sense.serving.settings import ServingSettings
from spider_sense.types import Action

THROTTLES = Policy(rules=(Rule(detector="*", zone="suspect", action="throttle"),), throttle=Throttle(requests=1))


@pytest.fixture
def guard(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> Guard:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    return Guard.from_pretrained(tmp_path / "guard")


def info(guard: Guard, policy: Policy) -> float | None:
    labels = {"guard": guard.digest, "policy": policy.digest, "version": "1.2"}
    return REGISTRY.get_sample_value("spider_sense_guard_info", labels)


def in_force(guard: Guard, policy: Policy) -> dict[str, Any]:
    return {"in_force": about(guard, policy, ServingSettings(guard=Path("g")), {})}


def test_what_is_said_counted_and_slowed_is_that_of_the_guard_in_force(guard: Guard) -> None:
    async def run() -> None:
        front = Front(guard, THROTTLES, "1.2")
        throttle = front.throttle
        assert throttle is not None
        front.take({"seconds": 0.0, "ended": [], "throttled": ["a"]})
        assert [bool(await throttle.wait("a")) for _ in range(2)] == [False, True]
        faster = THROTTLES.model_copy(update={"throttle": Throttle(requests=2)})
        front.take(in_force(guard, faster))
        assert front.said["policy"]["digest"] == faster.digest
        assert (info(guard, THROTTLES), info(guard, faster)) == (0, 1)
        assert [bool(await throttle.wait("a")) for _ in range(3)] == [False, False, True]
        front.take(in_force(guard, Policy.shadow()))
        assert (info(guard, faster), info(guard, Policy.shadow())) == (0, 1)
        assert [await throttle.wait("a") for _ in range(3)] == [0] * 3
        # And back.
        front.take(in_force(guard, THROTTLES))
        assert (info(guard, THROTTLES), info(guard, Policy.shadow())) == (1, 0)
        assert front.throttle is throttle

    asyncio.run(run())


def test_how_long_reasoning_is_left_out_follows_a_reload(guard: Guard) -> None:
    def hushes(limit: Action, seconds: int) -> Policy:
        return Policy(rules=(), extraction=Extraction(limit=limit, act="stop", reasoning_seconds=seconds))

    note: Note = {"seconds": 0.0, "ended": [], "throttled": [], "hushed": ["a"]}
    front, now = Front(guard, hushes("omit_reasoning", 10), "1.2"), 0.0
    hush = front.hush
    assert hush is not None
    hush._clock = lambda: now
    front.take(note)
    assert ("a" in hush, "b" in hush) == (True, False)
    front.take(in_force(guard, hushes("omit_reasoning", 30)))
    front.take(note)
    now = 29.0
    assert "a" in hush
    front.take(in_force(guard, hushes("flag", 30)))
    assert "a" not in hush
    silent = Front(guard, hushes("flag", 30), "1.2")
    silent.take(note)
    assert silent.hush is None


def test_a_policy_that_never_throttles_needs_nothing_for_it(guard: Guard) -> None:
    front = Front(guard, Policy.default(), "1.2")
    front.take(in_force(guard, Policy.shadow()))
    assert front.throttle is None
    assert front.said["policy"]["actions"] == ["observe", "flag", "stop"]
