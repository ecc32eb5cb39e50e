"""Continuous batching: every request is scored as if it ran alone, stopped when it breaches, named anew."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import initialization, model_runner
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from spider_sense import guarded_model, packed_batches
from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.continuous import ContinuousCalls, check_manager
from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.forward import SequenceRows
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.packed_batches import PackedBatches
from spider_sense.policy import Policy, Rule, Steer
from spider_sense.types import Site

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
OTHERS = ([9, 33, 34, 35, 36, 37], [1, 5, 60], [1, 5, 23, 24])
TOKENS = 8


@pytest.fixture
def what(tiny_loaded: LoadedModel) -> LoadedModel:
    """The tiny model with its weights scaled up, so that no two hidden states are alike."""
    with torch.no_grad():
        for weight in tiny_loaded.model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    tiny_loaded.model.set_attn_implementation("sdpa")
    return tiny_loaded


def run(what: LoadedModel, prompts: Any, share: bool = False, **options: Any) -> list[list[int]]:
    settings = {"num_blocks": 64, "max_batch_tokens": 16, "block_size": 4, **options}
    outputs = what.model.generate_batch(
        [list(prompt) for prompt in prompts],
        generation_config=GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=share, **settings),
    )
    assert len(outputs) == len(prompts)
    return [list(output.generated_tokens) for output in outputs.values()]


def check(guards: Any, what: LoadedModel, guard: Guard, monitor: Monitor, prompts: Any, said: list[list[int]]) -> None:
    for index, (prompt, new) in enumerate(zip(prompts, said, strict=True)):
        case = monitor.continuous[f"req_{index}"]
        ids = guards.conversation(prompt, new)
        want = guards.offline_peak(guard, what.model, ids, len(prompt))
        torch.testing.assert_close(torch.from_numpy(case.peak), want, rtol=1e-4, atol=1e-4)
        assert (case.coverage.scored, case.coverage.missing) == (len(ids), 0)


def test_packed_requests_read_as_each_alone(guards: Any, what: LoadedModel) -> None:
    guard = guards.guard(what, guards.many_probes())
    free = run(what, PROMPTS)
    with Monitor(guard, Policy.shadow()).attach(what.model, what.tokenizer) as monitor:
        said = run(what, PROMPTS)
        assert said == free
        cases = dict(monitor.continuous)
        # Ids begin with req_0 again; these are other requests.
        again = run(what, OTHERS)
        assert all(monitor.continuous[name] is not case for name, case in cases.items())
        later = monitor.continuous
    check(guards, what, guard, monitor, OTHERS, again)
    assert later is monitor.continuous
    later.clear()
    later.update(cases)
    check(guards, what, guard, monitor, PROMPTS, said)


def seeker(guards: Any, what: LoadedModel, prompt: list[int], new: list[int], step: int) -> Guard:
    """Return a guard that breaches at the step-th new token of one request."""
    site = Site.parse("resid.0")
    hidden = guards.hidden_states(what.model, [*prompt, *new], [site])[site]
    probe = guards.seeker("seeker", hidden[len(prompt) + step])
    guard: Guard = guards.guard(what, [probe], guards.calibration(0.999, 0.999))
    return guard


@pytest.mark.parametrize("step", [-1, 2])
def test_a_breach_ends_its_request_and_no_other(guards: Any, what: LoadedModel, tmp_path: Path, step: int) -> None:
    free = run(what, PROMPTS)
    guard = seeker(guards, what, PROMPTS[1], free[1], step)
    with AuditLog(tmp_path / "log") as log:
        with Monitor(guard, Policy.default(), log).attach(what.model, what.tokenizer) as monitor:
            said = run(what, PROMPTS)
            free_slots = len(monitor._guarded._judge.scorer.stream._free)
        assert len(monitor._guarded._judge.scorer.stream._free) >= free_slots
    assert said == [free[0], free[1][: step + 2], free[2]]
    assert [monitor.continuous[f"req_{i}"].decision.action for i in range(3)] == ["observe", "stop", "observe"]
    events = [AuditEvent.model_validate_json(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted((event.event, event.request) for event in events if event.event in ("open", "close")) == [
        (event, f"req_{index}") for event in ("close", "open") for index in range(3)
    ]
    assert len(monitor._guarded._judge.scorer.stream._free) == len(monitor._guarded._judge.scorer.stream._state)


def test_a_reader_that_does_not_run_stops_everything(guards: Any, what: LoadedModel) -> None:
    guard = guards.guard(what, guards.many_probes())
    with Monitor(guard, Policy.default()).attach(what.model, what.tokenizer) as monitor:
        monitor._guarded._attachment._handles[0].remove()
        said = run(what, PROMPTS)
    assert [len(new) for new in said] == [1, 1, 1]


def test_steering_reaches_the_flagged_request(guards: Any, what: LoadedModel) -> None:
    free = run(what, PROMPTS)
    guard = seeker(guards, what, PROMPTS[1], free[1], 1)
    guard.vectors["calm@resid.0"] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    rules = (Rule(detector="*", zone="breach", action="steer"),)
    policy = Policy(rules=rules, steer=Steer(vector="calm", strength=90.0))
    with Monitor(guard, policy).attach(what.model, what.tokenizer) as monitor:
        said = run(what, PROMPTS)
    assert monitor.continuous["req_1"].decision.action == "steer"
    assert (said[0], said[2]) == (free[0], free[2])
    assert said[1][:3] == free[1][:3]
    assert said[1] != free[1]


def test_blocks_that_another_request_filled_are_missing(guards: Any, what: LoadedModel) -> None:
    guard = guards.guard(what, guards.many_probes())
    prompt = [1, 5, *range(20, 40)]
    with Monitor(guard, Policy.shadow()).attach(what.model, what.tokenizer) as monitor:
        run(what, [prompt] * 3, share=True)
        coverage = [case.coverage for case in monitor.continuous.values()]
    assert all(item.scored + item.missing == len(prompt) + TOKENS - 1 for item in coverage)
    assert any(item.missing for item in coverage)


def test_a_preempted_request_goes_on_where_it_was(
    guards: Any, what: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted: list[str] = []
    anew = RequestState.create_equivalent_initial_request

    def spy(state: Any) -> Any:
        preempted.append(state.request_id)
        return anew(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", spy)
    guard = guards.guard(what, guards.many_probes())
    prompts = [[1, 5, *range(20 + index, 32 + index)] for index in range(4)]
    free = run(what, prompts)
    with Monitor(guard, Policy.shadow()).attach(what.model, what.tokenizer) as monitor:
        # Room for fewer tokens than four requests need: some must give theirs up and be computed again.
        said = run(what, prompts, num_blocks=14)
    assert preempted
    assert said == free
    check(guards, what, guard, monitor, prompts, said)
    # It can be stopped as well as any other.
    row = int(preempted[0].removeprefix("req_"))
    with Monitor(seeker(guards, what, prompts[row], free[row], TOKENS - 3), Policy.default()).attach(
        what.model, what.tokenizer
    ):
        said = run(what, prompts, num_blocks=14)
    assert said == [new[: TOKENS - 1] if index == row else new for index, new in enumerate(free)]


def test_a_stop_in_the_middle_of_a_prompt_outlives_a_preemption(guards: Any, what: LoadedModel) -> None:
    judge = Judge(guards.guard(what, [guards.probe("mean", "mean", "resid.0")]), Policy.default())
    calls = ContinuousCalls(judge, lambda _: None, lambda _: None, lambda: None)

    def compute(state: Any, start: int, end: int) -> None:
        rows, prompt = np.arange(end - start), state.initial_tokens[: state._true_initial_tokens or None]
        item = SequenceRows("r", rows, rows + start, prompt, state, lambda: True)
        calls.begin([item])
        calls.scored(torch.zeros(end - start, 1), [item])

    state = RequestState("r", [1, 5, *range(20, 30)], max_new_tokens=TOKENS)
    compute(state, 4, 8)  # what was before is missing
    assert calls.cases["r"].decision.action == "stop"
    assert calls.cases["r"].stopped_after == 1
    for before in (0, 3):
        state.generated_tokens = list(range(40, 40 + before))
        state = state.create_equivalent_initial_request()
        compute(state, 0, 12 + before)
        state.status = RequestStatus.DECODING
        assert state.update_and_check_completion(50, None)
        assert state.generated_tokens == [50]
    assert calls.cases["r"].stopped_after == 1


def test_a_request_is_attributed_and_its_end_is_told(guards: Any, what: LoadedModel) -> None:
    ended: list[Any] = []
    guard = guards.guard(what, guards.many_probes())
    named = Monitor(guard, Policy.shadow(), on_close=ended.append, principal={"req_1": "team-a"}.get)
    with named.attach(what.model, what.tokenizer) as monitor:
        run(what, PROMPTS)
        monitor.close_ended()
        assert sorted((case.request.id, str(case.request.principal)) for case in ended) == [
            ("req_0", "None"),
            ("req_1", "team-a"),
            ("req_2", "None"),
        ]
    assert len(ended) == 3


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that believes it can capture graphs, on a CPU: a replay runs the recorded work and no hook."""
    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "CUDAGraph")
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, 0))

    def capture(runner: Any, step: Any, stream: Any, model: Any, *args: Any) -> None:
        step(model, *args)
        recorded = partial(step, lambda **inputs: model.forward(**inputs), *args)
        runner.inputs_and_outputs.set_graph(SimpleNamespace(replay=recorded, reset=lambda: None))

    (runner,) = (one for one in vars(model_runner).values() if hasattr(one, "_capture_graph"))
    monkeypatch.setattr(runner, "_capture_graph", capture)


ALL_BREACH = (-1e9, -1e9)


@pytest.mark.usefixtures("graphs")
def test_under_a_guard_no_step_is_a_replay(guards: Any, what: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    guard = guards.guard(what, guards.many_probes()[:1], guards.calibration(*ALL_BREACH))
    with Monitor(guard, Policy.default()).attach(what.model, what.tokenizer) as monitor:
        said = run(what, PROMPTS, use_cuda_graph=True)
        assert [len(answer) for answer in said] == [1, 1, 1]
        assert {case.decision.action for case in monitor.continuous.values()} == {"stop"}
    assert "runs without CUDA graphs" in caplog.text
    assert [len(answer) for answer in run(what, PROMPTS, use_cuda_graph=True)] == [TOKENS] * 3


@pytest.mark.usefixtures("graphs")
def test_a_step_that_no_hook_saw_fails_its_requests(
    guards: Any, what: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guards.guard(what, guards.many_probes()[:1], guards.calibration(*ALL_BREACH))
    monkeypatch.setattr(guarded_model, "without_graphs", lambda manager: manager)
    with Monitor(guard, Policy.default()).attach(what.model, what.tokenizer):
        outputs = what.model.generate_batch(
            [list(PROMPTS[0])],
            generation_config=GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=64, max_batch_tokens=16, block_size=4, allow_block_sharing=False, use_cuda_graph=True
            ),
        )
    (output,) = outputs.values()
    assert "ran no hook of the guard" in str(output.error)


def test_a_manager_from_before_with_its_graphs_is_refused(guards: Any, what: LoadedModel) -> None:
    config = SimpleNamespace(use_cuda_graph=(False, True), use_async_batching=True)
    what.model._cached_continuous_batching_manager = SimpleNamespace(
        continuous_batching_config=config, batch_processor=object()
    )
    with Monitor(guards.guard(what, guards.many_probes())).attach(what.model, what.tokenizer):
        with pytest.raises(ConfigError, match=r"use_cuda_graph=\(False, True\).*destroy_cached"):
            what.model.init_continuous_batching()
        config.use_cuda_graph = (False, False)
        check_manager(what.model._cached_continuous_batching_manager)


def test_who_stops_listening_within_a_step_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_batches, "_packed_forward", lambda _: None)
    batches, model = PackedBatches(), torch.nn.Identity()
    listeners = [SimpleNamespace(packed=None, passes=0, release=None) for _ in range(2)]
    for listener in listeners:
        batches._listeners.setdefault(id(model), []).append(listener)

    def run(processor: Any, model: Any) -> None:
        batches._listeners[id(model)].remove(listeners[0])
        listeners[1].passes += 1

    batches._wrap(run)(None, model)
    with pytest.raises(SpiderSenseError, match="ran no hook"):
        batches._wrap(lambda processor, model: None)(None, model)
