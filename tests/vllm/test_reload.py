"""A guard that is exchanged in a running engine: who is scored by which, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spider_sense.errors import ConfigError, MismatchError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.serving import reload_seams
from spider_sense.serving.canary_seams import _alone
from spider_sense.serving.core_seams import SAID
from spider_sense.serving.graph import OP_VERSION
from spider_sense.serving.reload_seams import reloaded
from spider_sense.training.canaries import make_canaries

pytestmark = [
    pytest.mark.vllm,
    # vLLM's own, when it is imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def assert_scored_by(answers: list[dict[str, Any]], folder: Path, offline: Callable[..., Any]) -> None:
    for one in answers:
        said = one["said"]
        assert said["guard"] == Guard.from_pretrained(folder).digest
        tokens = said["coverage"]["scored"] + said["coverage"]["cached"]
        assert (tokens, said["coverage"]["missing"]) == (len(one["prompt"]) + len(one["tokens"]) - 1, 0)
        want_H, _ = offline(folder, (one["prompt"] + one["tokens"])[:tokens], len(one["prompt"]))
        found_H = torch.tensor([float(detector["score"]) for detector in said["detectors"].values()])
        assert ((found_H - want_H).abs() / want_H.abs().clamp(min=1.0)).max() <= 1e-4


@pytest.fixture
def other(guard: Path, loaded: LoadedModel, tmp_path: Path) -> Path:
    """A guard of the same sites and columns with weights half as large."""
    read = Guard.from_pretrained(guard)
    probes = tuple(
        replace(probe, maps={site: replace(item, weight=item.weight / 2) for site, item in probe.maps.items()})
        for probe in read.probes
    )
    canaries = make_canaries(loaded, probes)
    Guard(read.manifest.model_copy(update={"canaries": canaries}), probes).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_running_requests_end_under_the_old_guard_and_later_ones_under_the_new(
    guard: Path,
    other: Path,
    one_head: Callable[[str, float, float], Path],
    prompts: list[list[int]],
    options: dict[str, Any],
    run_job: Callable[..., dict[str, Any]],
    offline: Callable[..., Any],
    tmp_path: Path,
) -> None:
    old, new = Guard.from_pretrained(guard), Guard.from_pretrained(other)
    drifted = old.manifest.model_copy(update={"canaries": new.manifest.canaries})
    Guard(drifted, old.probes).save_pretrained(tmp_path / "drifted")
    settings = {"spider_sense": {"guard": str(guard), "scores": True}}
    job = {
        "engine": {**options, "enforce_eager": False, "additional_config": settings},
        "prompts": [prompts[2], prompts[11]],
        "good": str(other),
        "bad": [str(tmp_path / "drifted"), str(one_head("head0", 1.0, 2.0)), str(tmp_path / "nowhere")],
    }
    # The engine core and its worker are processes of their own, and the model is traced with the taps of the old guard.
    found = run_job("reload_job.py", job, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_CI_ENV": "1"})
    said, still_paused = found["impatient"]
    assert said.startswith("requests still run")
    assert not still_paused
    assert found["reload_waited"]
    for canaries in (found["started"], found["reloaded"]):
        assert canaries["accepted"]
        assert 0 < canaries["difference"] < 1e-4
    for when, which in (("before", guard), ("running", guard), ("waiting", other), ("after", other)):
        assert_scored_by(found[when], which, offline)
    refused = found["refused"]
    assert "does not score as the guard was calibrated" in refused[0]
    assert f"the model was compiled with the probes {OP_VERSION}/head0:" in refused[1]
    assert "nowhere/guard.json does not exist" in refused[2]
    assert all(text.endswith("The engine goes on with the guard of before") for text in refused)


def paused(guard: Path, **parts: Any) -> Any:
    """Return as much of an engine core as a reload asks, with a guard whose policy flags and stops."""
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={"spider_sense": {"guard": str(guard)}},
            parallel_config=SimpleNamespace(data_parallel_size=1),
        ),
        scheduler=SimpleNamespace(running=[]),
        is_scheduler_paused=lambda: True,
        **{SAID: {"policy": {"actions": ["observe", "flag", "stop"]}}},
        **parts,
    )


def test_an_engine_that_was_started_without_a_guard_takes_none() -> None:
    core = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    refused = reloaded(core, lambda *_: None, "guard", None)["refused"]
    assert refused.startswith("this engine runs without a guard, and its graph has no room for one; start anew")


def test_a_client_that_leaves_while_canaries_run_leaves_no_request_behind() -> None:
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

    class Waiting:
        def __init__(self, ended: bool) -> None:
            self.is_finished = lambda: ended

    stays, leaves = Waiting(ended=False), Waiting(ended=True)
    queue = create_request_queue(SchedulingPolicy.FCFS)
    queue.extend([leaves, stays])
    states: list[Any] = []
    scheduler = SimpleNamespace(
        waiting=queue, policy=SchedulingPolicy.FCFS, pause_state=PauseState.PAUSED_NEW, set_pause_state=states.append
    )
    with _alone(scheduler):
        assert not scheduler.waiting
    assert list(scheduler.waiting) == [stays]
    assert states == [PauseState.UNPAUSED, PauseState.PAUSED_NEW]


@pytest.mark.parametrize("error", [MismatchError("drift"), RuntimeError("a step failed")], ids=["drift", "broken"])
def test_canaries_that_drift_are_a_refusal_and_those_that_break_the_engine_its_end(
    error: Exception, guard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine import EngineCoreRequestType

    def fail(*_: Any) -> None:
        raise error

    called: list[str] = []
    queue: list[Any] = []

    def collective_rpc(name: str, **_: Any) -> list[None]:
        called.append(name)
        return [None]

    core = paused(guard, collective_rpc=collective_rpc, input_queue=SimpleNamespace(put_nowait=queue.append))
    monkeypatch.setattr(reload_seams, "try_canaries", fail)
    if isinstance(error, MismatchError):
        assert reloaded(core, lambda *_: None, str(guard), None) == {"refused": "drift"}
        assert called == ["spider_sense_exchange", "spider_sense_restore"]
        assert not queue
    else:
        with pytest.raises(RuntimeError, match="a step failed"):
            reloaded(core, lambda *_: None, str(guard), None)
        assert called == ["spider_sense_exchange"]
        assert queue == [(EngineCoreRequestType.EXECUTOR_FAILED, b"")]


def test_what_the_scheduler_cannot_do_is_refused_before_the_workers_hear_of_it(guard: Path) -> None:
    def cannot(*_: Any) -> None:
        raise ConfigError("serve with --no-async-scheduling")

    assert reloaded(paused(guard), cannot, str(guard), None) == {"refused": "serve with --no-async-scheduling"}


@pytest.mark.parametrize(
    ("action", "policy"),
    [
        ("throttle", "rules: [{detector: '*', zone: suspect, action: throttle}]"),
        ("omit_reasoning", "{rules: [], extraction: {limit: omit_reasoning, act: stop}}"),
    ],
)
def test_a_policy_that_begins_to_do_what_was_not_made_sure_of_is_refused(
    action: str, policy: str, guard: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy.yaml").write_text(policy)
    found = reloaded(paused(guard), lambda *_: None, str(guard), str(tmp_path / "policy.yaml"))
    assert f"says {action}, and that of before did not" in found["refused"]
