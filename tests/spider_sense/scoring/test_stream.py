"""The state table: slots that are handed out, grown, and taken back."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sense_kernels import PROMPT, WATCHED, FoldRows, Lane, LaneTable
from spider_sense.scoring import Aggregator, Stream

AGGREGATORS: dict[str, dict[str, Any]] = {
    "attention": {"parts": 2},
    "cusum": {"kappa": 0.1},
    "ema_max": {"alpha": 0.3},
    "max": {},
    "mean": {},
    "multimax": {"parts": 2},
    "rolling_attention": {"window": 3},
    "rolling_mean_max": {"window": 3},
    "softmax": {"temperature": 2.0},
}


def stream(*kinds: str, slots: int = 4) -> Stream:
    lanes, column = list[Lane](), 0
    for head, kind in enumerate(kinds):
        aggregator = Aggregator.model_validate({"kind": kind, **AGGREGATORS[kind]})
        lanes.extend(aggregator.lanes(head, column))
        column += aggregator.columns
    return Stream(LaneTable(lanes, len(kinds)), slots)


def columns(*kinds: str) -> int:
    return sum(Aggregator.model_validate({"kind": kind, **AGGREGATORS[kind]}).columns for kind in kinds)


def feed(what: Stream, slot: int, logits_TC: Tensor) -> None:
    """Fold rows of one slot; the last one is watched."""
    rows = len(logits_TC)
    code = np.full(rows, PROMPT)
    code[-1:] |= WATCHED
    what.fold(logits_TC, FoldRows(np.arange(rows), code, np.array([0, rows]), np.array([slot])))


def table(what: Stream, slots: list[int]) -> list[Tensor]:
    """Return the bits of everything that is kept about some slots."""
    return [what._state[slots].view(torch.int32), what._count[slots], what._peak[slots].view(torch.int32)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_slots_grow_and_running_ones_keep_their_state() -> None:
    what = stream(*AGGREGATORS, slots=1)
    first = what.open()
    feed(what, first, torch.randn(5, columns(*AGGREGATORS)))
    before = table(what, [first])
    slots = [what.open() for _ in range(20)]
    assert len({first, *slots}) == 21
    assert same(table(what, [first]), before)
    blank = stream(*AGGREGATORS)
    fresh = table(blank, [blank.open()])
    assert all(same(table(what, [slot]), fresh) for slot in slots)


@pytest.mark.parametrize("bad", [1.0, float("nan")])
def test_a_slot_that_is_used_again_is_clean(bad: float) -> None:
    what = stream(*AGGREGATORS, slots=1)
    slot = what.open()
    fresh = table(what, [slot])
    feed(what, slot, torch.full((4, columns(*AGGREGATORS)), bad))
    what.close(slot)
    assert what.open() == slot
    assert same(table(what, [slot]), fresh)
    assert (what.peak([slot]) == -torch.inf).all()
    assert (what.readout([slot]) == -torch.inf).all()


def test_a_slot_is_closed_once() -> None:
    what = stream("mean")
    slot = what.open()
    what.close(slot)
    for wrong in (slot, 2, -1, 99):
        with pytest.raises(ValueError, match=f"slot {wrong} is not in use"):
            what.close(wrong)


def test_a_step_without_rows_is_allowed() -> None:
    what = stream("mean")
    what.fold(torch.zeros(0, 1), FoldRows(np.arange(0), np.arange(0), np.array([0]), np.arange(0)))
    assert what.peak([]).shape == (0, 1)
