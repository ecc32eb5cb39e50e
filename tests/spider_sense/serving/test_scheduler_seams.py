"""What acts in a scheduler is there from its start, under the policy that its workers read then."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError
from spider_sense.models import LoadedModel
from spider_sense.serving import patch_seams, scheduler_seams
from spider_sense.serving.actor import ACTOR


@pytest.mark.parametrize("guarded", [True, False])
def test_what_acts_is_made_with_the_scheduler(
    guarded: bool, tiny_loaded: LoadedModel, guards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    told = {"spider_sense": {"guard": str(tmp_path / "guard")}} if guarded else {}
    scheduler = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=told))
    actor = SimpleNamespace(update=lambda original, scheduler, step, output: ("acted on", original(step, output)))
    monkeypatch.setattr(scheduler_seams, "_check_own", lambda *_: None)
    monkeypatch.setattr(patch_seams, "scheduling", lambda *_: None)
    monkeypatch.setattr(scheduler_seams, "keep_answers_apart", lambda *_: None)
    monkeypatch.setattr(scheduler_seams, "new_actor", lambda *_: actor)
    scheduler_seams._scheduling(lambda: None, scheduler)
    assert hasattr(scheduler, ACTOR) is guarded
    monkeypatch.setattr(scheduler_seams, "new_actor", lambda *_: pytest.fail("made anew"))
    found = scheduler_seams._updated(lambda step, output: (step, output), scheduler, "step", "output")
    assert found == (("acted on", ("step", "output")) if guarded else ("step", "output"))


class Vllms:
    """In the place of vLLM's ``Scheduler``."""

    def __init__(self, told: Any) -> None:
        self.vllm_config = SimpleNamespace(additional_config=told)

    def update_from_output(self, step: Any, output: Any) -> Any:
        return step, output


class Inherits(Vllms):
    """As vLLM's ``AsyncScheduler`` does."""


class Own(Inherits):
    def update_from_output(self, step: Any, output: Any) -> Any:
        return output


@pytest.mark.parametrize("kind", [Vllms, Inherits, Own])
def test_a_scheduler_that_takes_in_tokens_its_own_way_is_refused(
    kind: Any, tiny_loaded: LoadedModel, guards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.scheduler", SimpleNamespace(Scheduler=Vllms))
    monkeypatch.setattr(patch_seams, "scheduling", lambda *_: None)
    monkeypatch.setattr(scheduler_seams, "keep_answers_apart", lambda *_: None)
    monkeypatch.setattr(scheduler_seams, "new_actor", lambda *_: "acts")
    scheduler = kind({"spider_sense": {"guard": str(tmp_path / "guard")}})
    if kind is not Own:
        scheduler_seams._scheduling(lambda: None, scheduler)
        assert getattr(scheduler, ACTOR) == "acts"
        return
    with pytest.raises(ConfigError, match=r"test_scheduler_seams\.Own takes in tokens by an update_from_output of its"):
        scheduler_seams._scheduling(lambda: None, scheduler)
    # Without a guard it is nobody's business.
    scheduler_seams._scheduling(lambda: None, kind({}))
