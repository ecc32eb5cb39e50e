"""What is learned of honest principals: bins, what is usual, how rare a piece of evidence is.

Shape letters: N principals, J directions, B bins, F features.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.features import highest, looks, recent_vector, vector
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import BINS, CHECKPOINTS, EMPTY_LINK, States
from spider_sense.extraction.level import LevelModel
from spider_sense.extraction.own import directions
from spider_sense.extraction.thresholds import EVERYBODY
from spider_sense.extraction.tracker import Tracker, walk

__all__ = ["QUANTILES", "Population"]

SAMPLE = 50
"""Requests of a principal that the bins are set on, spread evenly over its life."""
QUANTILES = (0.84, 0.87, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999)
"""Of the bins' edges: below the first one every request is like any other."""
SHARES = np.linspace(0.1, 0.8, BINS - 1)
"""Edges of the share of alike openings: its quantiles are those of tenants that repeat themselves by trade."""
LEAST_HONEST = 40
"""Principals that reach a checkpoint; with fewer, the model of the checkpoint before is used."""


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Fitted on honest principals; calibration uses others."""

    edges: NDArray[np.float32]
    """[J, B - 1], quantiles of honest requests, every principal weighing the same."""
    centres: NDArray[np.float32]
    """[B], the mean of the first direction in each of its bins."""
    active: NDArray[np.bool_]
    """Directions that vary, [J]."""
    levels: Mapping[int, LevelModel]
    """By checkpoint."""
    recent: LevelModel
    """Of recent requests, for the looks after the last checkpoint."""
    floors: Mapping[str, float]
    """By tenant type, and of everybody: the highest level of these principals, below which nobody is limited."""
    prevalence: Mapping[int, int]
    """Keyed hashes of link evidence that at least two honest principals hold, and how many do."""
    principals: int
    """Honest principals that ``prevalence`` was counted on."""
    probe_names: tuple[str, ...]

    @classmethod
    def fit(cls, honest: Sequence[Sequence[Event]], key: Key, probe_names: Sequence[str] = ()) -> "Population":
        """Fit on streams, one principal each, in the order of time.

        Args:
            honest: principals; their first probe must come from ``probes.crossed``, or their own requests look tamer
                than a stranger's.
            key: of the detector.
            probe_names: for evidence in words.

        Raises:
            DataError: if too few streams are long enough.
        """
        edges, centres, active = _bins(honest)
        tracker = Tracker(edges, active, salt=key.hash("salt", ""))
        snapshots, states = _snapshots(honest, tracker, centres, key)
        levels = _levels(snapshots)
        recent = LevelModel.fit(snapshots[max(levels)].recent_NF)
        holders = Counter(int(token) for state in states for token in np.unique(state["links"]) if token != EMPTY_LINK)
        return cls(
            edges=edges,
            centres=centres,
            active=active,
            levels=levels,
            recent=recent,
            floors=_floors(snapshots, levels, recent),
            prevalence={token: count for token, count in holders.items() if count > 1},
            principals=len(honest),
            probe_names=tuple(probe_names),
        )

    @property
    def ceiling(self) -> float:
        """The highest level that a principal can reach."""
        top = highest(self.centres)
        return max(float(model.score(top)[0]) for model in (*self.levels.values(), self.recent))

    def tracker(self, key: Key) -> Tracker:
        """Return what carries states along."""
        return Tracker(self.edges, self.active, salt=key.hash("salt", ""))

    def share(self, token: int) -> float:
        """Return the share of honest principals that hold a hash; one that was never seen counts as held by one."""
        return self.prevalence.get(token, 1) / (self.principals + 1)

    def model_at(self, count: int) -> LevelModel | None:
        """Return the model of a checkpoint, or of the last one before it that has one."""
        known = [checkpoint for checkpoint in self.levels if checkpoint <= count]
        return self.levels[max(known)] if known else None

    def reading(self, states_N: States, count: int) -> tuple[LevelModel | None, NDArray[np.float64]]:
        """Return what judges principals at a look, and what it reads of them, [N, F].

        Args:
            states_N: of the principals.
            count: requests at the look.
        """
        if count > CHECKPOINTS[-1]:
            return self.recent, recent_vector(states_N, self.centres)
        return self.model_at(count), vector(states_N, self.centres)


def _bins(honest: Sequence[Sequence[Event]]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    sample = [stream[i] for stream in honest for i in np.linspace(0, len(stream) - 1, SAMPLE).astype(int)]
    batch = EventBatch.of([event for event in sample if event.sketch is not None])
    if len(batch) < SAMPLE * LEAST_HONEST:
        raise DataError(
            f"bins cannot be set on {len(honest)} honest principals, {len(batch)} of whose {len(sample)} sampled "
            f"requests have activations; {LEAST_HONEST} principals with activations are needed"
        )
    x_NI = directions(batch)
    edges = np.concatenate([np.quantile(x_NI, QUANTILES, axis=0).T, SHARES[None]]).astype(np.float32)
    first = (x_NI[:, :1] > edges[0]).sum(axis=1)
    counts, sums = (np.bincount(first, weights, minlength=BINS) for weights in (None, x_NI[:, 0]))
    # An empty bin stands for its lower edge.
    centres = np.where(counts > 0, sums / np.maximum(counts, 1), np.concatenate([edges[0, :1], edges[0]]))
    return edges, centres.astype(np.float32), np.append(x_NI.std(axis=0) > 1e-6, True)


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """The principals that reached a look."""

    all_NF: NDArray[np.float64]
    """Features of all their requests."""
    recent_NF: NDArray[np.float64]
    tenant_N: NDArray[np.bytes_]
    """Tenant types."""


Snapshots = Mapping[int, _Snapshot]
"""By requests at the look."""


def _snapshots(
    streams: Sequence[Sequence[Event]], tracker: Tracker, centres: NDArray[np.float32], key: Key
) -> tuple[Snapshots, States]:
    found: dict[int, _Snapshot] = {}

    def step(rows: NDArray[np.int64], states: States, batch: EventBatch) -> States:
        tracker.advance(states, batch)
        count = int(states["count"][0])  # streams go in step
        if looks(states["count"][:1])[0]:
            found[count] = _Snapshot(vector(states, centres), recent_vector(states, centres), states["tenant"].copy())
        return states

    return found, walk(streams, key, step)


def _levels(snapshots: Snapshots) -> dict[int, LevelModel]:
    fitted = {
        count: LevelModel.fit(seen.all_NF)
        for count, seen in snapshots.items()
        if count in CHECKPOINTS and len(seen.all_NF) >= LEAST_HONEST
    }
    if not fitted:
        raise DataError(
            f"no checkpoint is reached by {LEAST_HONEST} honest principals; give more streams of at least "
            f"{CHECKPOINTS[0]} requests"
        )
    return fitted


def _floors(snapshots: Snapshots, levels: Mapping[int, LevelModel], recent: LevelModel) -> dict[str, float]:
    floors: dict[str, float] = {}
    late = [count for count in snapshots if count > CHECKPOINTS[-1]]
    for count in (*levels, *late):
        seen = snapshots[count]
        scores = levels[count].score(seen.all_NF) if count in levels else recent.score(seen.recent_NF)
        for name in (EVERYBODY, *(bytes(tenant).decode("ascii") for tenant in np.unique(seen.tenant_N))):
            highest = scores[seen.tenant_N == name.encode()] if name else scores
            floors[name] = max(floors.get(name, -np.inf), float(highest.max()))
    return floors
