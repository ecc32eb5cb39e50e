"""Carries principals' states from request to request; everything but the judgement.

Shape letters: N principals, J directions, B bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError
from spider_sense.extraction.event import Event, EventBatch, rounds
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import States
from spider_sense.extraction.own import alike, bet, binned, directions
from spider_sense.extraction.profile import record
from spider_sense.extraction.state import fresh

__all__ = ["Tracker", "walk"]


@dataclass(frozen=True, slots=True, eq=False)
class Tracker:
    """What an update needs besides state and request."""

    edges: NDArray[np.float32]
    """[J, B - 1]"""
    active: NDArray[np.bool_]
    """[J]"""
    salt: int
    """Keyed 64 bits that token ids are hashed with."""

    def advance(self, states_N: States, batch: EventBatch) -> NDArray[np.float64]:
        """Add one request to each state, in place, and return the own-history statistic [N].

        It is -inf for a request without activations: such a one changes the counters alone.
        """
        record(states_N, batch, self.salt)
        own = np.full(len(states_N), -np.inf)
        seen = np.flatnonzero(np.isfinite(batch.sketch[:, 0]))
        if len(seen):
            whole = len(seen) == len(states_N)
            part = states_N if whole else states_N[seen]
            x_NJ = np.concatenate([directions(batch), alike(states_N, batch)], axis=1)
            own[seen] = bet(part, binned(x_NJ[seen], self.edges), self.active)
            if not whole:
                states_N[seen] = part
        better = own > states_N["own"]
        states_N["own"][better], states_N["own_at"][better] = own[better], states_N["count"][better]
        return own


def walk(
    streams: Sequence[Sequence[Event]], key: Key, step: Callable[[NDArray[np.int64], States, EventBatch], States]
) -> States:
    """Carry the states of N streams through all their events together, and return them at the end, [N].

    Args:
        streams: one principal each, in the order of time.
        key: names their seeds.
        step: given the streams that go on, their states and their next events, returns the next states.

    Raises:
        DataError: if a stream is empty or holds the events of two principals.
    """
    for index, stream in enumerate(streams):
        owners = {event.principal for event in stream}
        if len(owners) != 1:
            named = ", ".join(sorted(owners)) or "nobody"
            raise DataError(
                f"stream {index} holds events of {named}; a stream has one principal and at least one event"
            )
    # The longest first: those that go on are always the first ones, a view and no copy.
    order = np.argsort([-len(stream) for stream in streams], kind="stable")
    longest = [streams[index] for index in order]
    states_N = fresh([key.seed(stream[0].principal) for stream in longest])
    for count, batch in rounds(longest):
        going_on = states_N[:count]
        moved = step(order[:count], going_on, batch)
        if moved is not going_on:
            states_N[:count] = moved
    result = np.empty_like(states_N)
    result[order] = states_N
    return result
