"""Joining two neighbouring segments: the kinds that can be merged read as if all tokens had come in one stream."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sense_kernels import MERGE, PROMPT, FoldRows, Lane, LaneTable, State, fold_torch
from sense_kernels.recurrences import READOUT

C = 3
LANES = (
    Lane(kind="mean", head=0, value=0),
    Lane(kind="max", head=1, value=1),
    Lane(kind="attention", head=2, value=0, query=2),
    Lane(kind="attention", head=3, value=1, query=0, param=0.3),
    Lane(kind="attention", head=3, value=2, query=1, param=2.0),
)


def folded(table: LaneTable, *segments: Tensor) -> State:
    """Fold each segment into a slot of its own."""
    state = table.new_state(len(segments))
    for slot, logits_TC in enumerate(segments):
        rows = len(logits_TC)
        start, code = np.array([0, rows]), np.full(rows, PROMPT)
        if rows:
            fold_torch(*state, logits_TC, FoldRows(np.arange(rows), code, start, np.array([slot])), table)
    return state


def merged_and_whole(left_TC: Tensor, right_TC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the running values of each group, of the merged segments and of the whole."""
    table = LaneTable(LANES, 4)
    state, counts, _ = folded(table, left_TC, right_TC, torch.cat((left_TC, right_TC)))
    found = []
    for index, group in enumerate(table.groups):
        left, right, whole = state[:, group.offset : group.stop].view(3, 1, -1, group.width)
        count = counts[:, index : index + 1]
        merged = MERGE[group.kind](left, count[0], right, count[1])
        assert count[0] + count[1] == count[2]
        read = READOUT[group.kind]
        found.append((read(group, merged, count[2:]), read(group, whole, count[2:])))
    return found


@given(st.integers(0, 2**16), st.integers(0, 6), st.integers(1, 6), st.booleans(), st.sampled_from([0.1, 1.0, 40.0]))
def test_merged_segments_read_as_the_whole(seed: int, short: int, long: int, swap: bool, scale: float) -> None:
    left, right = (long, short) if swap else (short, long)
    logits = torch.randn(left + right, C, generator=torch.Generator().manual_seed(seed)) * scale
    for merged, whole in merged_and_whole(logits[:left], logits[left:]):
        torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_a_poisoned_segment_poisons_the_merger(poisoned: int) -> None:
    segments = [torch.randn(2, C), torch.randn(2, C)]
    segments[poisoned][:] = torch.nan
    for merged, _ in merged_and_whole(*segments):
        assert merged.isnan().all()
