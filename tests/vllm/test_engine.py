"""The guard inside a real vLLM engine finds what transformers finds, whatever the engine does to the rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm
Offline = Callable[[Path, list[int], int], torch.Tensor]


def assert_equals_offline(one: dict[str, Any], guard: Path, offline: Offline) -> None:
    """Compare an answer with an offline score of the same tokens: 1e-4 of the score, and every token is covered."""
    said = one["said"]
    assert said is not None
    covered = said["coverage"]
    tokens = covered["scored"] + covered["cached"]
    assert covered["missing"] == 0
    assert tokens == len(one["prompt"]) + len(one["tokens"]) - 1
    want_H = offline(guard, (one["prompt"] + one["tokens"])[:tokens], len(one["prompt"]))
    found_H = torch.tensor([float(detector["score"]) for detector in said["detectors"].values()])
    error_H = (found_H - want_H).abs() / want_H.abs().clamp(min=1.0)
    assert error_H.max() <= 1e-4, error_H


@pytest.mark.parametrize(
    ("engine", "environment"),
    [
        pytest.param({}, {}, id="eager"),
        pytest.param({"enforce_eager": False}, {"VLLM_CPU_CI_ENV": "1"}, id="traced"),
        pytest.param({"enforce_eager": False}, {}, id="compiled"),
    ],
)
def test_verdicts_equal_offline_ones_cold_and_warm(
    engine: dict[str, Any],
    environment: dict[str, str],
    guard: Path,
    prompts: list[list[int]],
    run_engine: Callable[..., Any],
    offline: Offline,
) -> None:
    cold, warm = run_engine(
        [prompts, prompts], {"guard": str(guard), "scores": True}, environment=environment, **engine
    )
    for first, second in zip(cold, warm, strict=True):
        assert_equals_offline(first, guard, offline)
        assert_equals_offline(second, guard, offline)
        assert second["tokens"] == first["tokens"]
        cached = second["said"]["coverage"]["cached"]
        # A block holds 128 tokens, and of a whole prompt in the cache the last token is computed again.
        assert cached == (len(first["prompt"]) - 1) // 128 * 128
    assert any(second["said"]["coverage"]["cached"] for second in warm)


def test_the_second_runner_says_the_same(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline
) -> None:
    few = [prompts[0], prompts[3], prompts[11], prompts[5]]
    cold, warm = run_engine(
        [few, few[2:3]], {"guard": str(guard), "scores": True}, {"max_tokens": 4}, second_runner=True
    )
    for one in (*cold, *warm):
        assert_equals_offline(one, guard, offline)
    assert warm[0]["said"]["coverage"]["cached"] == (len(prompts[11]) - 1) // 128 * 128 > 0


def test_a_guard_changes_no_token_and_is_inert_where_none_is_named(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any]
) -> None:
    (bare,) = run_engine([prompts], None)
    (guarded,) = run_engine([prompts], {"guard": str(guard)})
    (off,) = run_engine([prompts], {"guard": str(guard)}, environment={"SPIDER_SENSE_ENABLED": "0"})
    assert [one["tokens"] for one in bare] == [one["tokens"] for one in guarded] == [one["tokens"] for one in off]
    assert all(one["said"] is None for one in (*bare, *off))
    assert all("score" not in found for one in guarded for found in one["said"]["detectors"].values())


def test_preempted_requests_lose_nothing(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline
) -> None:
    # Seven requests that want two blocks each in the end, and one more later, in eight blocks.
    short = [ids[:100] for ids in prompts[-7:]]
    (found,) = run_engine(
        [short],
        {"guard": str(guard), "scores": True},
        {"max_tokens": 60, "ignore_eos": True},
        num_gpu_blocks_override=9,
        max_num_batched_tokens=256,
    )
    for one in found:
        assert_equals_offline(one, guard, offline)


def test_copies_of_a_prompt_are_told_apart(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline
) -> None:
    (found,) = run_engine([prompts[:2]], {"guard": str(guard), "scores": True}, {"n": 3, "temperature": 1.0})
    assert len(found) == 6
    assert len({tuple(one["tokens"]) for one in found[:3]}) == 3
