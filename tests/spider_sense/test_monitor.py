"""The monitor: what it does to the rows that breach, that it does nothing to others, and that it fails closed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spider_sense.errors import SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy, Rule, Steer
from spider_sense.types import Site

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
WIDTH, ROW = 17, 0
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
REFUSAL = [40, 41, 42, 2]
STOP = Rule(detector="*", zone="breach", action="stop")
STEER = Rule(detector="*", zone="breach", action="steer")


def policy(rule: Rule = STOP, **options: Any) -> Policy:
    return Policy(rules=(rule,), refusal="w23 w24 w25", **options)


@pytest.fixture
def free(guards: Any, tiny_loaded: LoadedModel) -> torch.Tensor:
    """What the model says when nobody watches; its weights are scaled up so that no two hidden states are alike."""
    with torch.no_grad():
        for weight in tiny_loaded.model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    ids: torch.Tensor = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    return ids


@pytest.fixture
def seek(guards: Any, tiny_loaded: LoadedModel, free: torch.Tensor) -> Callable[[int], Guard]:
    """Return the builder of a guard that only row ROW breaches, at the token in a column of the free output."""
    site = Site.parse("resid.0")

    def build(column: int) -> Guard:
        rows = [[*prompt, *row[WIDTH:].tolist()] for prompt, row in zip(PROMPTS, free, strict=True)]
        hidden = [guards.hidden_states(tiny_loaded.model, row, [site])[site] for row in rows]
        place = column - WIDTH + len(PROMPTS[ROW])
        x = torch.cat([h / h.norm(dim=-1, keepdim=True) for h in hidden]) @ torch.nn.functional.normalize(
            hidden[ROW][place], dim=0
        )
        assert x.topk(2).values[1] < 0.998, "two tokens look the same"
        guard: Guard = guards.guard(
            tiny_loaded, [guards.seeker("seeker", hidden[ROW][place])], guards.calibration(0.999, 0.999)
        )
        return guard

    return build


def slots(monitor: Monitor) -> int:
    return len(monitor._guarded._judge.scorer.stream._free)


def refused_at(row: torch.Tensor) -> int:
    """Return the column where the refusal begins; after it there is nothing but padding."""
    tokens = row.tolist()
    start = next(i for i in range(len(tokens)) if tokens[i : i + 4] == REFUSAL)
    assert not any(tokens[start + 4 :])
    return start


@pytest.mark.parametrize("column", [WIDTH - 2, WIDTH - 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("same_step", [False, True])
def test_a_breach_ends_its_row_and_no_other(
    guards: Any, tiny_loaded: LoadedModel, free: torch.Tensor, seek: Any, column: int, same_step: bool
) -> None:
    with Monitor(seek(column), policy(same_step=same_step)).attach(tiny_loaded.model, tiny_loaded.tokenizer) as monitor:
        output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
        cases = monitor.cases
    start = max(column + 1, WIDTH) + (not same_step)
    assert refused_at(output[ROW]) == start
    assert torch.equal(output[ROW, :start], free[ROW, :start])
    for row in (1, 2):
        assert torch.equal(output[row], free[row])
    assert [case.decision.action for case in cases] == ["stop", "observe", "observe"]
    assert [case.verdicts[0].zone for case in cases] == ["breach", "clear", "clear"]
    assert all(case.coverage.complete for case in cases)


def test_a_batch_that_is_stopped_altogether_keeps_its_history(guards: Any, tiny_loaded: LoadedModel) -> None:
    guard = guards.guard(tiny_loaded, guards.many_probes(), guards.calibration(-1e9, -1e9))
    seen: list[int] = []
    monitor = Monitor(guard, policy(), keep_history=True, on_step=lambda cases: seen.append(len(cases)))
    with monitor.attach(tiny_loaded.model, tiny_loaded.tokenizer):
        output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
    assert [refused_at(row) for row in output] == [WIDTH + 1] * len(PROMPTS)
    assert [case.stopped_after for case in monitor.cases] == [1] * len(PROMPTS)
    assert all(case.history for case in monitor.cases)
    assert seen


def test_sampling_and_filters_cannot_talk_over_a_refusal(guards: Any, tiny_loaded: LoadedModel, seek: Any) -> None:
    options = {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9}
    limits = {"min_new_tokens": 10, "repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "max_new_tokens": 12}
    with Monitor(seek(WIDTH - 1), policy(same_step=True)).attach(tiny_loaded.model, tiny_loaded.tokenizer):
        output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **options, **limits)
    assert refused_at(output[ROW]) == WIDTH


@pytest.mark.parametrize("column", [WIDTH - 1, WIDTH + 4])
@pytest.mark.parametrize("wrong", [False, True])
def test_drafted_tokens_do_not_put_a_stop_off(
    tiny_model: Callable[[str], Any], tiny_loaded: LoadedModel, seek: Any, column: int, wrong: bool
) -> None:
    # Another model's drafts are rejected; those found in the prompt may be accepted together with the breach.
    drafts = {"assistant_model": tiny_model("qwen2")} if wrong else {"prompt_lookup_num_tokens": 3}
    shift = WIDTH - len(PROMPTS[ROW])
    with Monitor(seek(column), policy(same_step=True)).attach(tiny_loaded.model, tiny_loaded.tokenizer):
        output = tiny_loaded.model.generate(torch.tensor([PROMPTS[ROW]]), **GREEDY, **drafts)
    start = max(column + 1, WIDTH) - shift
    assert start <= refused_at(output[0]) <= start + (0 if wrong else 3)


def test_steering_changes_flagged_rows_only(guards: Any, tiny_loaded: LoadedModel, seek: Any) -> None:
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    before = tiny_loaded.model.generate(**guards.pad(PROMPTS), **options)
    guard = seek(WIDTH + 1)
    guard.vectors["calm@resid.0"] = torch.randn(32)
    rules = policy(STEER, steer=Steer(vector="calm", strength=8.0), same_step=True)
    with Monitor(guard, rules).attach(tiny_loaded.model, tiny_loaded.tokenizer) as monitor:
        after = tiny_loaded.model.generate(**guards.pad(PROMPTS), **options)
        assert [case.decision.action for case in monitor.cases] == ["steer", "observe", "observe"]
        again = tiny_loaded.model.generate(**guards.pad(PROMPTS[1:]), **options)
    for step, (old, new) in enumerate(zip(before.logits, after.logits, strict=True)):
        assert torch.equal(old[1:], new[1:])
        assert torch.equal(old[ROW], new[ROW]) == (step < 3)
    assert torch.equal(again.sequences, tiny_loaded.model.generate(**guards.pad(PROMPTS[1:]), **GREEDY))


def test_a_streamer_gets_what_is_returned(tiny_loaded: LoadedModel, seek: Any) -> None:
    said: list[int] = []

    class Collect:
        def put(self, value: torch.Tensor) -> None:
            said.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            said.append(-1)

    with Monitor(seek(WIDTH + 2), policy()).attach(tiny_loaded.model, tiny_loaded.tokenizer):
        output = tiny_loaded.model.generate(torch.tensor([PROMPTS[ROW]]), **GREEDY, streamer=Collect())
    assert said == [*output[0].tolist(), -1]
    assert said[-5:-1] == REFUSAL


@pytest.mark.parametrize("probe", [0, 1, 2])
def test_a_reader_that_does_not_run_is_a_breach(guards: Any, tiny_loaded: LoadedModel, probe: int) -> None:
    guard = guards.guard(tiny_loaded, guards.many_probes())
    with Monitor(guard, policy(same_step=True)).attach(tiny_loaded.model, tiny_loaded.tokenizer) as monitor:
        silent = monitor._guarded._judge.bank.sites[probe]
        monitor._guarded._attachment._handles[probe].remove()
        output = tiny_loaded.model.generate(**guards.pad(PROMPTS), **GREEDY)
        for case, row in zip(monitor.cases, output, strict=True):
            assert refused_at(row) == WIDTH
            for verdict, item in zip(case.verdicts, guard.probes, strict=True):
                reads = silent in item.maps and item.aggregator.span != "response"
                assert verdict.zone == ("breach" if reads else "clear")


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}], ids=str)
def test_a_pass_that_is_not_announced_is_an_error(guards: Any, tiny_loaded: LoadedModel, options: Any) -> None:
    guard = guards.guard(tiny_loaded, guards.many_probes())
    with Monitor(guard, Policy.shadow()).attach(tiny_loaded.model, tiny_loaded.tokenizer) as monitor:
        free = slots(monitor)
        for handle in monitor._guarded._attachment._handles[-2:]:
            handle.remove()
        with pytest.raises(SpiderSenseError, match="hooks did not run"):
            tiny_loaded.model.generate(torch.tensor([PROMPTS[0]]), **GREEDY, **options)
        assert slots(monitor) == free
