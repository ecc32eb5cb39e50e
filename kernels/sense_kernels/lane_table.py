"""The packed description of every aggregator of a bank: its lanes in order, and where each has its state.

Shape letters: N slots, S state floats of a slot, G groups, L lanes, H heads.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sense_kernels.lanes import GROUP_LANES, LANE_KINDS, HostGroup, Lane, LaneGroup, LaneKind, lane_width

__all__ = ["LaneTable", "State"]


class State(NamedTuple):
    """Streaming state of N slots, or of N KV blocks."""

    state: Tensor  # [N, S] float32
    counts: Tensor  # [N, G] int64, rows folded by each group
    peak: Tensor  # [N, H] float32, greatest readout at a watched row


class LaneTable:
    """All lanes of a bank, grouped and laid out in the state of a slot.

    Args:
        lanes: in any order; they are sorted by group here.
        heads: number of heads H; every head needs a lane.
        device: where the index and parameter tensors live.

    Raises:
        ValueError: if a head has no lane, or lanes of one head differ in kind, span or window.
    """

    def __init__(self, lanes: Sequence[Lane], heads: int, device: torch.device | str = "cpu") -> None:
        ordered = _order(lanes, heads)
        spec: list[int] = []
        for (kind, span, window, parts, _), members in groupby(ordered, key=lambda item: item[0]):
            spec += (LANE_KINDS.index(kind), span, window, parts, len(list(members)))
        only = [lane for _, lane in ordered]
        self._fill(
            torch.tensor([lane.value for lane in only], device=device),
            torch.tensor([max(lane.query, 0) for lane in only], device=device),
            torch.tensor([lane.param for lane in only], device=device),
            torch.tensor([lane.head for lane in only], device=device),
            tuple(spec),
            heads,
        )

    @classmethod
    def unpack(
        cls, value: Tensor, query: Tensor, param: Tensor, head: Tensor, spec: Sequence[int], heads: int
    ) -> "LaneTable":
        """Return the table that its own attributes describe, as they travel through a registered op."""
        table = cls.__new__(cls)
        table._fill(value, query, param, head, tuple(spec), heads)
        return table

    def _fill(
        self, value: Tensor, query: Tensor, param: Tensor, head: Tensor, spec: tuple[int, ...], heads: int
    ) -> None:
        self.value = value
        """Value column of every lane, int64 [L], groups one after the other."""
        self.query = query
        """Query column of every lane, int64 [L]; 0 where there is none."""
        self.param = param
        """Parameter of every lane, float32 [L]."""
        self.head = head
        """Head of every lane, int64 [L]."""
        self.spec = spec
        """Kind, span, window, parts and number of lanes of each group, one after the other."""
        self.heads = heads
        self.groups = list(_groups(spec, param))
        self.state_floats = self.groups[-1].stop if self.groups else 0
        """S, floats of state that one slot needs."""
        self.spans = sorted({group.span for group in self.groups})

    @cached_property
    def host(self) -> tuple[HostGroup, ...]:
        """The groups for the paths of the CPU."""
        value, query, param, head = (tensor.cpu().numpy() for tensor in (self.value, self.query, self.param, self.head))
        return tuple(
            HostGroup(
                kind=group.kind,
                window=group.window,
                parts=group.parts,
                width=group.width,
                floats=slice(group.offset, group.stop),
                value=value[group.lanes],
                query=query[group.lanes],
                param=param[group.lanes],
                heads=_as_slice(head[group.lanes][:: group.parts]),
            )
            for group in self.groups
        )

    @cached_property
    def host_spans(self) -> npt.NDArray[np.int64]:
        """Span of every group, [G]."""
        return np.array([group.span for group in self.groups])

    @cached_property
    def host_floats(self) -> npt.NDArray[np.int64]:
        """State float of every head, [H], that is its readout once its window is full.

        Without meaning for attention, and for heads of several lanes.
        """
        floats = np.empty(self.heads, np.int64)
        for group in self.host:
            first = np.arange(group.floats.start, group.floats.stop, group.width * group.parts)
            floats[group.heads] = first if group.kind in ("mean", "max") else first + group.width - 1
        return floats

    def new_state(self, slots: int, device: torch.device | str = "cpu") -> State:
        """Return fresh tables for N slots or KV blocks."""
        state = State(
            torch.zeros(slots, self.state_floats, device=device),
            torch.zeros(slots, len(self.groups), dtype=torch.int64, device=device),
            torch.empty(slots, self.heads, device=device),
        )
        self.reset(*state, torch.arange(slots, device=device))
        return state

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


def _as_slice(heads: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | slice:
    run = np.arange(heads[0], heads[0] + len(heads))
    return slice(int(run[0]), int(run[-1]) + 1) if np.array_equal(heads, run) else heads


_Key = tuple[LaneKind, int, int, int, int]


def _order(lanes: Sequence[Lane], heads: int) -> list[tuple[_Key, Lane]]:
    """Return the lanes sorted by group: kind, span, window, parts, and a number that bounds the group's size."""
    by_head: list[list[Lane]] = [[] for _ in range(heads)]
    for lane in lanes:
        by_head[lane.head].append(lane)
    placed: Counter[tuple[LaneKind, int, int, int]] = Counter()
    ordered: list[tuple[_Key, Lane]] = []
    for head, own in enumerate(by_head):
        kinds = {(lane.kind, lane.span, lane.window) for lane in own}
        if len(kinds) != 1:
            raise ValueError(f"head {head} has lanes of {len(kinds)} kinds; all of them need one kind, span and window")
        key = (*kinds.pop(), len(own))
        ordered += [((*key, placed[key] // max(1, GROUP_LANES // len(own))), lane) for lane in own]
        placed[key] += 1
    return sorted(ordered, key=lambda item: item[0])


def _groups(spec: tuple[int, ...], param: Tensor) -> Iterator[LaneGroup]:
    offset = first = 0
    for kind, span, window, parts, count in zip(*[iter(spec)] * 5, strict=True):
        name = LANE_KINDS[kind]
        lanes, width = slice(first, first + count), lane_width(name, window)
        yield LaneGroup(name, span, window, parts, width, offset, lanes, param[lanes])
        offset, first = offset + width * count, first + count
