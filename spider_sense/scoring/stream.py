"""The state table: one row per running request, grown on demand, with slots handed out and taken back.

Shape letters: N slots, S state floats, G lane groups, H heads, B requests of a step, T packed rows, C logit columns.
"""

import torch
from torch import Tensor

from sense_kernels import PROMPT, FoldRows, LaneTable, State, fold, readout_torch

__all__ = ["Stream"]


class Stream:
    """Streaming state of all running requests.

    Args:
        table: the lanes of the bank.
        slots: rows to begin with.
        device: where the state lives.
    """

    def __init__(self, table: LaneTable, slots: int = 16, device: torch.device | str = "cpu") -> None:
        self.table = table
        self._device = torch.device(device)
        self._state, self._count, self._peak = table.new_state(slots, device)
        self._free = list(range(slots))[::-1]

    def open(self) -> int:
        """Return a fresh slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.table.reset(self._state, self._count, self._peak, self._index([slot]))
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back.

        Raises:
            ValueError: if the slot is not in use.
        """
        if slot in self._free or not 0 <= slot < len(self._state):
            raise ValueError(f"slot {slot} is not in use")
        self._free.append(slot)

    def fold(self, logits_TC: Tensor, rows: FoldRows, trace: Tensor | None = None, blocks: State | None = None) -> None:
        """Fold rows of a step; see :func:`sense_kernels.fold`."""
        if len(rows.slot_B):
            fold(self._state, self._count, self._peak, logits_TC, rows, self.table, trace, blocks)

    def readout(self, slots: list[int]) -> Tensor:
        """Return the running values [B, H]."""
        return readout_torch(self._state, self._count, self._index(slots), self.table)

    def peak(self, slots: list[int]) -> Tensor:
        """Return the maxima over time [B, H]; -inf before the end of the prompt, NaN after a bad logit."""
        return self._peak[self._index(slots)]

    def take(self, slot: int, blocks: State, block: int, whole: bool) -> None:
        """Let a slot go on from the state of a KV block that lies within its prompt, so that no maximum was watched.

        Args:
            slot: where to.
            blocks: states of the blocks.
            block: which one.
            whole: take every head's state. Otherwise all tokens so far count as prompt before its tail: heads that read
                the tail or the response have seen none of theirs.
        """
        index_1 = self._index([slot])
        self.table.reset(self._state, self._count, self._peak, index_1)
        for place, group in enumerate(self.table.groups):
            if whole or group.span & PROMPT:
                self._state[slot, group.offset : group.stop] = blocks.state[block, group.offset : group.stop]
                self._count[slot, place] = blocks.counts[block, place]

    def _index(self, slots: list[int]) -> Tensor:
        # From pageable memory the copy would wait for all that the stream has still to do.
        pinned = torch.tensor(slots, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return pinned.to(self._device, non_blocking=True)

    def _grow(self) -> None:
        size = len(self._state)
        more = self.table.new_state(size, self._device)
        self._state, self._count, self._peak = (
            torch.cat(pair) for pair in zip((self._state, self._count, self._peak), more, strict=True)
        )
        self._free = list(range(size, 2 * size))[::-1]
