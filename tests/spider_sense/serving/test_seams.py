"""What of the seams runs without vLLM."""

from types import SimpleNamespace
from typing import Any

from spider_sense.judge import Judge
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.seams import _executed


def test_a_dummy_step_is_none_of_the_guards(tiny_loaded: LoadedModel, guards: Any) -> None:
    # An idle data-parallel rank computes one whenever another rank has work; its requests do not exist.
    judge = Judge(guards.guard(tiny_loaded, guards.many_probes()[:1]), Policy.default())
    runner = SimpleNamespace(_spider_sense_guard=EngineGuard(judge))
    seen: list[Any] = []
    step = SimpleNamespace(total_num_scheduled_tokens=3)
    assert _executed(lambda _: ((), (), ()), lambda *args, **_: seen.append(args), runner, step, dummy_run=True) is None
    assert seen == [(step,)]
    assert not runner._spider_sense_guard.waiting
