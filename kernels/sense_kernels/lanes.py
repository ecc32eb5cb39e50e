"""The packed description of every aggregator of a bank.

A *head* (one readout of a probe) is a sum of *lanes*; a lane is one streaming recurrence over one value column of the
logits, attention lanes over a query column as well. Lanes of the same kind, span and window form a *group*: one
vectorised update, one contiguous slice of the state. Which rows a lane folds is said by its *span*, a bit mask that is
compared with each row's code.

Shape letters: N slots, S state floats of a slot, G groups, L lanes of a group, C logit columns, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["PROMPT", "RESPONSE", "TAIL", "WATCHED", "Lane", "LaneGroup", "LaneKind", "LaneTable"]

PROMPT = 1
"""Row code bit: the row is a prompt token."""
TAIL = 2
"""Row code bit: the row is one of the last prompt tokens, the ones the chat template adds after the user's turn."""
RESPONSE = 4
"""Row code bit: the row is a generated token."""
WATCHED = 8
"""Row code bit: after this row the readout counts towards the maximum over time."""

LaneKind = Literal["mean", "max", "ema_max", "attention", "cusum", "rolling_mean_max", "rolling_attention"]

_FIXED_WIDTH = {"mean": 1, "max": 1, "ema_max": 2, "attention": 3, "cusum": 2}


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
        if self.kind not in get_args(LaneKind):
            raise ValueError(f"unknown lane kind {self.kind!r}; known: {', '.join(get_args(LaneKind))}")
        if self.kind.startswith(("rolling", "ema")) and self.window < 1:
            raise ValueError(f"{self.kind} needs a window of at least 1 token, got {self.window}")
        if self.kind.endswith("attention") and self.query < 0:
            raise ValueError(f"{self.kind} needs a query column, got {self.query}")

    @property
    def width(self) -> int:
        """State floats of this lane."""
        if self.kind == "rolling_mean_max":
            return self.window + 1
        if self.kind == "rolling_attention":
            return 2 * self.window + 1
        return _FIXED_WIDTH[self.kind]


@dataclass(frozen=True, slots=True)
class LaneGroup:
    """Lanes that one vectorised update serves."""

    kind: LaneKind
    span: int
    window: int
    width: int
    offset: int
    """First state float of the group; lane l of the group starts at ``offset + l * width``."""
    lanes: slice
    """The group's lanes among all lanes of the table."""
    param: Tensor  # [L] float32

    @property
    def stop(self) -> int:
        """One past the group's last state float."""
        return self.offset + self.width * len(self.param)


class LaneTable:
    """All lanes of a bank, grouped and laid out in the state of a slot.

    Args:
        lanes: in any order; they are sorted by group here.
        heads: number of heads H; every head needs a lane.
        device: where the index and parameter tensors live.

    Raises:
        ValueError: if a head has no lane, or lanes of one head have different spans.
    """

    def __init__(self, lanes: Sequence[Lane], heads: int, device: torch.device | str = "cpu") -> None:
        spans_by_head: dict[int, set[int]] = {head: set() for head in range(heads)}
        for lane in lanes:
            spans_by_head[lane.head].add(lane.span)
        for head, spans in spans_by_head.items():
            if len(spans) != 1:
                raise ValueError(f"head {head} has lanes of {len(spans)} spans; it needs lanes of exactly one")

        def key(lane: Lane) -> tuple[str, int, int]:
            return lane.kind, lane.span, lane.window

        self.heads = heads
        self.groups: list[LaneGroup] = []
        ordered, offset, first = sorted(lanes, key=key), 0, 0
        for _, members in groupby(ordered, key=key):
            group = _make_group(list(members), offset, first, device)
            self.groups.append(group)
            offset, first = group.stop, group.lanes.stop
        self.value = torch.tensor([lane.value for lane in ordered], device=device)
        """Value column of every lane, int64, groups one after the other."""
        self.query = torch.tensor([max(lane.query, 0) for lane in ordered], device=device)
        """Query column of every lane; 0 where there is none."""
        attention = [lane.param if lane.kind.endswith("attention") else 1.0 for lane in ordered]
        self.scale = torch.tensor(attention, device=device)
        """Factor on every lane's query."""
        self.head = torch.tensor([lane.head for lane in ordered], device=device)
        """Head of every lane."""
        self.group = torch.tensor(
            [index for index, group in enumerate(self.groups) for _ in group.param], device=device
        )
        """Group of every lane."""
        self.state_floats = offset
        """S, floats of state that one slot needs."""
        self.spans = sorted({group.span for group in self.groups})

    def new_state(self, slots: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Return fresh tables: state [N, S] float32, count [N, G] int64, peak [N, H] float32."""
        state = torch.zeros(slots, self.state_floats, device=device)
        count = torch.zeros(slots, len(self.groups), dtype=torch.int64, device=device)
        peak = torch.empty(slots, self.heads, device=device)
        self.reset(state, count, peak, torch.arange(slots, device=device))
        return state, count, peak

    def reset(self, state: Tensor, count: Tensor, peak: Tensor, slots: Tensor) -> None:
        """Make the given slots [B] as if no token had ever been folded into them."""
        blank = torch.zeros(self.state_floats, device=state.device)
        for group in self.groups:
            view = blank[group.offset : group.stop].view(-1, group.width)
            if group.kind in ("max", "attention"):
                view[:, 0] = -torch.inf
            elif group.kind in ("ema_max", "cusum", "rolling_mean_max", "rolling_attention"):
                view[:, -1] = -torch.inf
        state[slots] = blank
        count[slots] = 0
        peak[slots] = -torch.inf


def _make_group(lanes: list[Lane], offset: int, first: int, device: torch.device | str) -> LaneGroup:
    return LaneGroup(
        kind=lanes[0].kind,
        span=lanes[0].span,
        window=lanes[0].window,
        width=lanes[0].width,
        offset=offset,
        lanes=slice(first, first + len(lanes)),
        param=torch.tensor([lane.param for lane in lanes], device=device),
    )
