"""Lanes, and the groups that they form.

A *head* (one readout of a probe) is a sum of *lanes*; a lane is one streaming recurrence over one value column of the
logits, attention lanes over a query column as well. Heads of the same kind, span, window and number of lanes form a
*group*: one vectorised update, one contiguous slice of the state. Which rows a lane folds is said by its *span*, a bit
mask that is compared with each row's code.

Shape letters: L lanes of a group.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = [
    "GROUP_LANES",
    "LANE_KINDS",
    "PROMPT",
    "RESPONSE",
    "TAIL",
    "WATCHED",
    "HostGroup",
    "Lane",
    "LaneGroup",
    "LaneKind",
    "lane_width",
]

PROMPT = 1
"""Row code bit: the row is a prompt token."""
TAIL = 2
"""Row code bit: the row is one of the last prompt tokens, the ones the chat template adds after the user's turn."""
RESPONSE = 4
"""Row code bit: the row is a generated token."""
WATCHED = 8
"""Row code bit: after this row the readout counts towards the maximum over time."""

LaneKind = Literal["mean", "max", "ema_max", "attention", "cusum", "rolling_mean_max", "rolling_attention"]

LANE_KINDS: tuple[LaneKind, ...] = get_args(LaneKind)
"""Every kind; a kind's place here is its number in a table's ``spec``."""

GROUP_LANES = 64
"""Most lanes of a group, unless one head has more: what one GPU program holds in registers."""

_FIXED_WIDTH = {"mean": 1, "max": 1, "ema_max": 2, "attention": 3, "cusum": 2}


def lane_width(kind: LaneKind, window: int) -> int:
    """Return the state floats of a lane."""
    if kind == "rolling_mean_max":
        return window + 1
    if kind == "rolling_attention":
        return 2 * window + 1
    return _FIXED_WIDTH[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One streaming recurrence.

    Raises:
        ValueError: for an unknown kind, a window below 1, or an attention lane without a query column.
    """

    kind: LaneKind
    head: int
    """Index of the head that this lane's readout is added to."""
    value: int
    """Logit column of the value z (or v)."""
    query: int = -1
    """Logit column of the attention score q; attention kinds only."""
    span: int = PROMPT | RESPONSE
    """Rows to fold: those whose code shares a bit with this mask."""
    param: float = 1.0
    """ema_max: alpha. cusum: kappa, the drift taken off each token. attention kinds: factor on the query."""
    window: int = 0
    """Rolling kinds: tokens in the window. ema_max: tokens of warm-up."""

    def __post_init__(self) -> None:
        if self.kind not in LANE_KINDS:
            raise ValueError(f"unknown lane kind {self.kind!r}; known: {', '.join(LANE_KINDS)}")
        if self.kind.startswith(("rolling", "ema")) and self.window < 1:
            raise ValueError(f"{self.kind} needs a window of at least 1 token, got {self.window}")
        if self.kind.endswith("attention") and self.query < 0:
            raise ValueError(f"{self.kind} needs a query column, got {self.query}")

    @property
    def width(self) -> int:
        """State floats of this lane."""
        return lane_width(self.kind, self.window)


@dataclass(frozen=True, slots=True)
class LaneGroup:
    """Heads of one kind, span, window and number of lanes: one vectorised update, one GPU program a request."""

    kind: LaneKind
    span: int
    window: int
    parts: int
    """Lanes of each head, next to each other."""
    width: int
    offset: int
    """First state float of the group; lane l of the group starts at ``offset + l * width``."""
    lanes: slice
    """The group's lanes among all lanes of the table."""
    param: Tensor  # [L] float32

    @property
    def heads(self) -> int:
        """Heads in the group."""
        return (self.lanes.stop - self.lanes.start) // self.parts  # type: ignore[no-any-return]

    @property
    def stop(self) -> int:
        """One past the group's last state float."""
        return self.offset + self.width * (self.lanes.stop - self.lanes.start)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class HostGroup:
    """A group with its indices and parameters as host arrays, for the paths of the CPU."""

    kind: LaneKind
    window: int
    parts: int
    width: int
    floats: slice
    """The group's floats in the state of a slot."""
    value: npt.NDArray[np.int64]  # [L]
    query: npt.NDArray[np.int64]  # [L]
    param: npt.NDArray[np.float32]  # [L]
    heads: npt.NDArray[np.int64] | slice
    """The heads that the group's lanes belong to; a slice where they follow one another."""
