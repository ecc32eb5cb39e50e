"""Which packed rows belong to which request.

Shape letters: R rows to fold, B requests of this step.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["FoldRows", "IntArray", "RowTensors"]

IntArray = npt.NDArray[np.int64]


class RowTensors(NamedTuple):
    """The rows of a step on a device, int64 or int32. Fixed sizes can be captured: unused requests have slot -1.

    Without ``row`` and ``start`` it is a decode step: packed row b is the one row of request b.
    """

    row: Tensor | None  # [R] index into the packed rows
    code: Tensor  # [R]
    start: Tensor | None  # [B + 1]
    slot: Tensor  # [B], -1 for a request that is not to be touched
    accepted: Tensor | None = None  # [B] rows to commit, None for all
    block: Tensor | None = None  # [R] KV block whose last token the row is, or -1


@dataclass(frozen=True, slots=True)
class FoldRows:
    """The rows of a step as host arrays, sorted by request and then by position.

    A row that is padding is simply not listed.
    """

    row_R: IntArray
    """Index into the packed rows [T]."""
    code_R: IntArray
    """Row code: a sum of PROMPT, TAIL, RESPONSE and WATCHED."""
    start_B: IntArray
    """First entry of each request; B + 1 numbers, the last one is R."""
    slot_B: IntArray
    """State row of each request, all different; -1 for a request that is not to be touched."""
    accepted_B: IntArray | None = None
    """Rows of each request to commit, its first ones; the rest are draft tokens that were rejected. None: all."""
    block_R: IntArray | None = None
    """KV block of which the row is the last token, or -1; the request's state after the row is written there."""

    @property
    def one_each(self) -> bool:
        """Whether every request has exactly one row."""
        requests = len(self.slot_B)
        return len(self.row_R) == requests and self.start_B.tolist() == list(range(requests + 1))

    def committed(self) -> "FoldRows":
        """Return the rows that are to be folded: without rejected drafts and requests of slot -1."""
        if self.accepted_B is None and min(self.slot_B.tolist(), default=0) >= 0:
            return self
        lengths_B = np.diff(self.start_B)
        kept_B = lengths_B if self.accepted_B is None else np.minimum(lengths_B, self.accepted_B)
        kept_B = np.where(self.slot_B >= 0, kept_B, 0)
        offset_R = np.arange(len(self.row_R)) - np.repeat(self.start_B[:-1], lengths_B)
        keep_R = offset_R < np.repeat(kept_B, lengths_B)
        keep_B = kept_B > 0
        return replace(
            self,
            row_R=self.row_R[keep_R],
            code_R=self.code_R[keep_R],
            start_B=np.concatenate(([0], np.cumsum(kept_B[keep_B]))),
            slot_B=self.slot_B[keep_B],
            accepted_B=None,
            block_R=None if self.block_R is None else self.block_R[keep_R],
        )

    def to(self, device: torch.device) -> RowTensors:
        """Copy to a device, without waiting where it is an accelerator."""

        def move(array: IntArray | None) -> Tensor | None:
            if array is None:
                return None
            host = torch.from_numpy(array)
            return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)

        moved = [move(a) for a in (self.row_R, self.code_R, self.start_B, self.slot_B, self.accepted_B, self.block_R)]
        return RowTensors(*moved)  # type: ignore[arg-type]

    @classmethod
    def of(cls, rows: RowTensors) -> "FoldRows":
        """Return the rows of tensors, waiting for the device where they lie on one."""
        requests = len(rows.slot)
        if rows.row is None:
            rows = rows._replace(row=torch.arange(requests), start=torch.arange(requests + 1))
        return cls(*(None if tensor is None else tensor.long().cpu().numpy() for tensor in rows))  # type: ignore[arg-type]
