"""Which packed rows belong to which request, on the host and as tensors."""

import numpy as np
import pytest
import torch

from sense_kernels import FoldRows, RowTensors

CPU = torch.device("cpu")


def rows(lengths: list[int], slots: list[int], accepted: list[int] | None = None, blocks: bool = False) -> FoldRows:
    """Return rows 10, 11, ... with codes 0, 1, ..."""
    total = sum(lengths)
    return FoldRows(
        row_R=np.arange(10, 10 + total),
        code_R=np.arange(total),
        start_B=np.cumsum([0, *lengths]),
        slot_B=np.array(slots, np.int64),
        accepted_B=None if accepted is None else np.array(accepted),
        block_R=np.arange(total) - 1 if blocks else None,
    )


def test_rows_without_drafts_and_with_slots_are_all_committed() -> None:
    given = rows([2, 0, 1], [4, 2, 0])
    assert given.committed() is given
    assert rows([], []).committed().row_R.tolist() == []


@pytest.mark.parametrize("blocks", [False, True])
def test_rejected_drafts_and_requests_without_slot_are_dropped(blocks: bool) -> None:
    kept = rows([3, 2, 2, 1, 4], [5, 6, -1, 7, 8], [2, 0, 2, 9, 1], blocks).committed()
    assert kept.row_R.tolist() == [10, 11, 17, 18]
    assert kept.code_R.tolist() == [0, 1, 7, 8]
    assert kept.start_B.tolist() == [0, 2, 3, 4]
    assert kept.slot_B.tolist() == [5, 7, 8]
    assert kept.accepted_B is None
    assert (None if kept.block_R is None else kept.block_R.tolist()) == ([-1, 0, 6, 7] if blocks else None)


def test_requests_without_slot_are_dropped_where_all_rows_are_accepted() -> None:
    kept = rows([1, 2], [-1, 3]).committed()
    assert (kept.row_R.tolist(), kept.start_B.tolist(), kept.slot_B.tolist()) == ([11, 12], [0, 2], [3])


def test_nothing_may_be_left() -> None:
    for kept in (rows([1, 2], [-1, -1]).committed(), rows([1, 2], [0, 1], [0, 0]).committed()):
        assert (len(kept.row_R), len(kept.code_R), len(kept.slot_B), kept.start_B.tolist()) == (0, 0, 0, [0])


@pytest.mark.parametrize(
    ("lengths", "each"), [([1, 1, 1], True), ([], True), ([1], True), ([0, 2], False), ([2, 0], False), ([1, 2], False)]
)
def test_a_step_of_one_row_each_is_known(lengths: list[int], each: bool) -> None:
    assert rows(lengths, list(range(len(lengths)))).one_each is each


def test_to_a_device_and_back() -> None:
    for given in (rows([2, 0, 1], [4, 2, 0], [1, 0, 1], blocks=True), rows([1, 1], [1, 0])):
        tensors = given.to(CPU)
        assert all(tensor is None or tensor.dtype == torch.int64 for tensor in tensors)
        back = FoldRows.of(tensors)
        for name in ("row_R", "code_R", "start_B", "slot_B", "accepted_B", "block_R"):
            want, got = getattr(given, name), getattr(back, name)
            assert got is None if want is None else np.array_equal(got, want)


def test_narrow_integers_are_widened() -> None:
    wide = rows([2, 1], [1, 0]).to(CPU)
    back = FoldRows.of(wide._replace(code=wide.code.int(), slot=wide.slot.int(), accepted=torch.ones(2).int()))
    assert back.accepted_B is not None
    assert {array.dtype for array in (back.code_R, back.slot_B, back.accepted_B)} == {np.dtype(np.int64)}
    assert (back.code_R.tolist(), back.slot_B.tolist()) == ([0, 1, 2], [1, 0])


def test_a_decode_step_is_one_row_for_each_request() -> None:
    step = FoldRows.of(RowTensors(None, torch.tensor([4, 8, 12]), None, torch.tensor([2, -1, 0])))
    assert step.row_R.tolist() == [0, 1, 2]
    assert step.start_B.tolist() == [0, 1, 2, 3]
    assert step.one_each
    assert step.committed().row_R.tolist() == [0, 2]
