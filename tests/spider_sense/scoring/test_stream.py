"""The state table: slots, snapshots to undo with, and joining segments."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sense_kernels import MERGE, PROMPT, RESPONSE, WATCHED, FoldRows, Lane, LaneTable
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
MERGEABLE = ("attention", "max", "mean", "multimax", "softmax")


def stream(*kinds: str, slots: int = 4) -> Stream:
    lanes, column = list[Lane](), 0
    for head, kind in enumerate(kinds):
        aggregator = Aggregator.model_validate({"kind": kind, **AGGREGATORS[kind]})
        lanes.extend(aggregator.lanes(head, column))
        column += aggregator.columns
    return Stream(LaneTable(lanes, len(kinds)), slots)


def columns(*kinds: str) -> int:
    return sum(Aggregator.model_validate({"kind": kind, **AGGREGATORS[kind]}).columns for kind in kinds)


def feed(what: Stream, slot: int, logits_TC: Tensor, response: bool = False) -> None:
    """Fold rows of one slot; the last one is watched, or all of a response."""
    rows = len(logits_TC)
    code = np.full(rows, RESPONSE | WATCHED if response else PROMPT)
    code[-1:] |= WATCHED
    what.fold(logits_TC, FoldRows(np.arange(rows), code, np.array([0, rows]), np.array([slot])))


def table(what: Stream, slots: list[int]) -> list[Tensor]:
    """Return the bits of everything that is kept about some slots."""
    snapshot = what.save(slots)
    return [snapshot.state_BS.view(torch.int32), snapshot.count_BG, snapshot.peak_BH.view(torch.int32)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 9), st.integers(1, 9), st.sampled_from([0.0, float("nan"), float("inf")]))
def test_a_suffix_that_is_rolled_back_leaves_no_trace(seed: int, kept: int, dropped: int, bad: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    what, width = stream(*AGGREGATORS), columns(*AGGREGATORS)
    slots = [what.open(), what.open()]
    if kept:
        feed(what, slots[0], torch.randn(kept, width, generator=draw) * 5)
    feed(what, slots[1], torch.randn(3, width, generator=draw))
    before, snapshot = table(what, slots), what.save(slots[:1])
    draft = torch.randn(dropped, width, generator=draw) * 50
    draft[-1, seed % width] += bad
    feed(what, slots[0], draft, response=True)
    assert not same(table(what, slots), before)
    what.restore(slots[:1], snapshot)
    assert same(table(what, slots), before)
    # And what follows is as if the draft had never been.
    other = stream(*AGGREGATORS)
    twin = other.open()
    other.restore([twin], snapshot)
    suffix = torch.randn(4, width, generator=draw)
    feed(what, slots[0], suffix, response=True)
    feed(other, twin, suffix, response=True)
    assert same(table(what, slots[:1]), table(other, [twin]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 6), st.integers(0, 6), st.sampled_from([0.1, 1.0, 40.0]))
def test_merged_segments_read_as_the_whole(seed: int, left: int, right: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    what = stream(*MERGEABLE)
    logits = torch.randn(left + right, columns(*MERGEABLE), generator=draw) * scale
    slots = [what.open(), what.open(), what.open(), what.open()]
    for slot, part in zip(slots, (logits[:left], logits[left:], logits), strict=False):
        if len(part):
            feed(what, slot, part)
    what.restore(slots[3:], what.merge(what.save(slots[:1]), what.save(slots[1:2])))
    readout = what.readout(slots)
    torch.testing.assert_close(readout[3], readout[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(what.save(slots[3:]).count_BG, what.save(slots[2:3]).count_BG)
    assert torch.equal(what.peak(slots)[3], what.peak(slots)[:2].amax(0))


def test_a_poisoned_segment_poisons_the_merger() -> None:
    what = stream(*MERGEABLE)
    slots = [what.open(), what.open()]
    feed(what, slots[0], torch.full((2, columns(*MERGEABLE)), torch.nan))
    feed(what, slots[1], torch.randn(2, columns(*MERGEABLE)))
    for order in (slots, slots[::-1]):
        merged = what.merge(what.save(order[:1]), what.save(order[1:]))
        what.restore(slots[1:], merged)
        assert what.readout(slots[1:]).isnan().all()
        assert merged.peak_BH.isnan().all()


@pytest.mark.parametrize("kind", sorted(set(AGGREGATORS) - set(MERGEABLE)))
def test_what_depends_on_order_cannot_be_merged(kind: str) -> None:
    what = stream("mean", kind)
    slots = [what.open(), what.open()]
    with pytest.raises(ValueError, match=f"{kind} cannot be merged; mergeable: {', '.join(sorted(MERGE))}"):
        what.merge(what.save(slots[:1]), what.save(slots[1:]))


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


def test_a_snapshot_is_a_copy() -> None:
    what = stream(*AGGREGATORS)
    slot = what.open()
    snapshot = what.save([slot])
    kept = [snapshot.state_BS.clone(), snapshot.count_BG.clone(), snapshot.peak_BH.clone()]
    feed(what, slot, torch.randn(3, columns(*AGGREGATORS)))
    assert same([snapshot.state_BS, snapshot.count_BG, snapshot.peak_BH], kept)


def test_a_step_without_rows_is_allowed() -> None:
    what = stream("mean")
    what.fold(torch.zeros(0, 1), FoldRows(np.arange(0), np.arange(0), np.array([0]), np.arange(0)))
    assert what.peak([]).shape == (0, 1)
