"""One request of a principal, as the extraction detector sees it: numbers and keyed hashes, no text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError
from spider_sense.extraction.layout import LISTS, PROBES, SKETCH, LinkKind

__all__ = ["CHOICES", "LATEST", "Event", "EventBatch", "rounds"]

LATEST = 1e11
"""Seconds since the epoch that no request can have; milliseconds do."""
CHOICES = 2**16
"""That a request can have at most."""

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Event:
    """One request.

    Raises:
        DataError: if a number is not finite or a shape is wrong.
    """

    principal: str
    time: float
    """Seconds since the epoch."""
    sketch: NDArray[np.float32] | None = None
    """[64], or None for a request whose activations were not seen."""
    probes: NDArray[np.float32] | None = None
    """Up to 8 probe logits, the first of the probe for all campaigns together; None as for the sketch."""
    tenant: str = ""
    """Declared type of the principal, at most 24 ASCII letters: its stratum."""
    opening: int = 0
    """Keyed hash of the masked opening of the user's text; 0 is unknown."""
    parameters: int = 0
    """Keyed hash of the sampling parameters; 0 is unknown."""
    links: tuple[tuple[LinkKind, int], ...] = ()
    """Keyed hashes that tell nothing of the content; that of the parameters is added by the detector."""
    biased: tuple[int, ...] = ()
    """Token ids that the client chose, see ``Asked``."""
    top_logprobs: int = 0
    max_tokens: int = 0
    """0 if the request set none."""
    choices: int = 1
    """Answers that were asked for (``n``), see ``Asked``."""
    known_list: int = -1
    """Index of the known query list that the text stands in, or -1."""

    def __post_init__(self) -> None:
        if not self.principal:
            raise DataError("an event has no principal; name whom the request is attributed to")
        if not 0 <= self.time < LATEST:
            raise DataError(f"the time of an event of {self.principal!r} is {self.time}; give seconds since the epoch")
        for name in ("top_logprobs", "max_tokens"):
            if not 0 <= getattr(self, name) < 2**31:
                raise DataError(f"{name} of an event of {self.principal!r} is {getattr(self, name)}; give 0 or more")
        if not 1 <= self.choices <= CHOICES:
            raise DataError(f"choices of an event of {self.principal!r} are {self.choices}; give 1 to {CHOICES}")
        if self.biased and not 0 <= min(self.biased) <= max(self.biased) < 2**31:
            raise DataError(f"an event of {self.principal!r} biases the token {min(self.biased)}; ids are 0 or more")
        if not self.tenant.isascii() or len(self.tenant) > 24:
            raise DataError(f"the tenant type {self.tenant!r} is not ASCII of at most 24 characters; shorten it")
        if not -1 <= self.known_list < LISTS:
            raise DataError(f"known_list is {self.known_list}; allowed are -1 to {LISTS - 1}")
        for name, value, width in (("sketch", self.sketch, SKETCH), ("probes", self.probes, PROBES)):
            if value is not None:
                _check(name, value, width, self.principal)


def _check(name: str, value: NDArray[np.float32], width: int, principal: str) -> None:
    fits = value.ndim == 1 and (len(value) == width if name == "sketch" else len(value) <= width)
    if not fits:
        raise DataError(f"the {name} of an event of {principal!r} has shape {list(value.shape)}; allowed is [{width}]")
    if not np.isfinite(value).all():
        raise DataError(f"the {name} of an event of {principal!r} holds a number that is not finite")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventBatch:
    """N requests of N different principals, as arrays."""

    time: NDArray[np.float64]
    sketch: NDArray[np.float32]
    """[N, 64]; a row of NaN where activations were not seen."""
    probes: NDArray[np.float32]
    """[N, 8]; NaN in the same rows, 0 in the columns that no probe has."""
    tenant: NDArray[np.bytes_]
    opening: NDArray[np.uint64]
    parameters: NDArray[np.uint64]
    top_logprobs: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    choices: NDArray[np.int64]
    known_list: NDArray[np.int64]
    biased: tuple[tuple[int, ...], ...]
    links: tuple[tuple[tuple[LinkKind, int], ...], ...]

    def __len__(self) -> int:
        return len(self.time)

    @classmethod
    def of(cls, events: Sequence[Event]) -> "EventBatch":
        """Pack events; their principals must differ."""

        def ints(name: str) -> NDArray[np.int64]:
            return np.array([getattr(event, name) for event in events], dtype=np.int64)

        def hashes(name: str) -> NDArray[np.uint64]:
            return np.array([getattr(event, name) & _MASK for event in events], dtype=np.uint64)

        sketch_NS = np.full((len(events), SKETCH), np.nan, dtype=np.float32)
        probes_NP = np.full((len(events), PROBES), np.nan, dtype=np.float32)
        for row, event in enumerate(events):
            if event.sketch is not None:
                sketch_NS[row] = event.sketch
                probes_NP[row] = 0
                if event.probes is not None:
                    probes_NP[row, : len(event.probes)] = event.probes
        return cls(
            time=np.array([event.time for event in events], dtype=np.float64),
            sketch=sketch_NS,
            probes=probes_NP,
            tenant=np.array([event.tenant for event in events], dtype="S24"),
            opening=hashes("opening"),
            parameters=hashes("parameters"),
            top_logprobs=ints("top_logprobs"),
            max_tokens=ints("max_tokens"),
            choices=ints("choices"),
            known_list=ints("known_list"),
            biased=tuple(event.biased for event in events),
            links=tuple(event.links for event in events),
        )


def rounds(streams: Sequence[Sequence[Event]]) -> Iterator[tuple[int, EventBatch]]:
    """Yield the first events of all streams, then the second ones, and so on, with how many streams go on.

    Args:
        streams: the longest first.
    """
    count = len(streams)
    for turn in range(max(map(len, streams), default=0)):
        while len(streams[count - 1]) <= turn:
            count -= 1
        yield count, EventBatch.of([stream[turn] for stream in streams[:count]])
