"""What is learned of a population: bins, what attackers look like, how rare a piece of evidence is.

Shape letters: N principals, J directions, B bins, F features, G features of a group's member.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError
from spider_sense.extraction.directions import directions
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.features import LEADING, mean_sketch, member_vector, vector
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import BINS, CHECKPOINTS, EMPTY_LINK, PROBES, States
from spider_sense.extraction.level import LevelModel
from spider_sense.extraction.profile import SCORING
from spider_sense.extraction.sketch import shrunk
from spider_sense.extraction.tracker import Tracker, walk

__all__ = ["LEAST_HALF", "Population"]

SAMPLE = 50
"""Requests of a principal that the bins are set on, spread evenly over its life."""
_TAIL = (0.002, 0.005, 0.01, 0.02, 0.04)
QUANTILES = np.array([*_TAIL, *np.linspace(0.07, 0.93, BINS - 1 - 2 * len(_TAIL)), *(1 - q for q in _TAIL[::-1])])
"""Of the bins' edges: finer in the tails, where a campaign lies."""
LEAST_BENIGN, LEAST_ATTACKERS = 40, 10
"""Principals that reach a checkpoint; with fewer, the model of the checkpoint before is used."""
LEAST_HALF = 8
"""Scored requests of a member that count in a group."""
NORMALISER = 4
"""Every fourth honest principal sets the scale of the scores instead of training them."""


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Fitted on honest principals and simulated attackers; calibration uses other principals."""

    edges: NDArray[np.float32]
    """[J, B - 1], quantiles of honest requests, every principal weighing the same."""
    centres: NDArray[np.float32]
    """[J, B], the mean of each bin."""
    active: NDArray[np.bool_]
    """Directions that vary, [J]."""
    levels: Mapping[int, LevelModel]
    """By checkpoint."""
    member: LevelModel
    """Score of a group's member, on its scoring half."""
    member_mean: NDArray[np.float64]
    """Of honest principals' mean sketches, [24]."""
    member_precision: NDArray[np.float64]
    """Inverse covariance of the same, [24, 24]."""
    member_scores: tuple[float, float]
    """Mean and standard deviation of honest members' scores."""
    prevalence: Mapping[int, int]
    """Keyed hashes of link evidence that at least two honest principals hold, and how many do."""
    principals: int
    """Honest principals that ``prevalence`` was counted on."""
    probe_names: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        benign: Sequence[Sequence[Event]],
        attackers: Sequence[Sequence[Event]],
        key: Key,
        probe_names: Sequence[str] = (),
    ) -> "Population":
        """Fit on streams, one principal each, in the order of time.

        Args:
            benign: honest principals.
            attackers: simulated ones, of every mixture with honest traffic that shall be found.
            key: of the detector.
            probe_names: for evidence in words.

        Raises:
            DataError: if too few streams are long enough.
            MissingExtraError: if scikit-learn is not installed.
        """
        edges, centres, active = _bins(benign)
        tracker = Tracker(edges, active, salt=key.hash("salt", ""))
        honest, honest_states = _snapshots(benign, tracker, centres, key)
        hostile, hostile_states = _snapshots(attackers, tracker, centres, key)
        members = honest_states[honest_states["moments"]["count"][:, SCORING] >= LEAST_HALF]
        hostile_members = hostile_states[hostile_states["moments"]["count"][:, SCORING] >= LEAST_HALF]
        member = _model(member_vector(members), member_vector(hostile_members), "group")
        means = mean_sketch(members)[:, :LEADING]
        scores = member.score(member_vector(members))
        holders = Counter(
            int(token) for state in honest_states for token in np.unique(state["links"]) if token != EMPTY_LINK
        )
        return cls(
            edges=edges,
            centres=centres,
            active=active,
            levels=_levels(honest, hostile),
            member=member,
            member_mean=means.mean(axis=0),
            member_precision=np.linalg.inv(shrunk(np.cov(means.T))).astype(np.float64),
            member_scores=(float(scores.mean()), max(float(scores.std()), 1e-6)),
            prevalence={token: count for token, count in holders.items() if count > 1},
            principals=len(benign),
            probe_names=tuple(probe_names) or tuple(f"probe {index}" for index in range(PROBES)),
        )

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


def _bins(benign: Sequence[Sequence[Event]]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    sample = [stream[i] for stream in benign for i in np.linspace(0, len(stream) - 1, SAMPLE).astype(int)]
    x_NJ = directions(EventBatch.of([event for event in sample if event.sketch is not None]))
    if len(x_NJ) < SAMPLE * BINS:
        raise DataError(
            f"bins cannot be set on {len(benign)} honest principals, {len(x_NJ)} of whose {len(sample)} sampled "
            f"requests have activations; {BINS} principals with activations are needed"
        )
    edges = np.quantile(x_NJ, QUANTILES, axis=0).T.astype(np.float32)
    bins = (x_NJ[:, :, None] > edges).sum(axis=2)
    centres = np.stack([_means(column, index) for column, index in zip(x_NJ.T, bins.T, strict=True)])
    return edges, centres.astype(np.float32), x_NJ.std(axis=0) > 1e-6


def _means(values: NDArray[np.float32], bins: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = np.bincount(bins, minlength=BINS)
    result: NDArray[np.float64] = np.bincount(bins, values, minlength=BINS) / np.maximum(counts, 1)
    return result


Snapshots = dict[int, NDArray[np.float64]]
"""By checkpoint: the features of the principals that reached it, [N, F]."""


def _snapshots(
    streams: Sequence[Sequence[Event]], tracker: Tracker, centres: NDArray[np.float32], key: Key
) -> tuple[Snapshots, States]:
    found: dict[int, list[NDArray[np.float64]]] = {checkpoint: [] for checkpoint in CHECKPOINTS}

    def step(rows: NDArray[np.int64], states: States, batch: EventBatch) -> States:
        tracker.advance(states, batch)
        count = int(states["count"][0])  # streams go in step
        if count in found:
            found[count].append(vector(states, centres))
        return states

    states = walk(streams, key, step)
    return {checkpoint: np.concatenate(parts) for checkpoint, parts in found.items() if parts}, states


def _levels(honest: Snapshots, hostile: Snapshots) -> dict[int, LevelModel]:
    fitted = {
        checkpoint: _model(honest[checkpoint], hostile[checkpoint], f"checkpoint {checkpoint}")
        for checkpoint in CHECKPOINTS
        if len(honest.get(checkpoint, ())) >= LEAST_BENIGN and len(hostile.get(checkpoint, ())) >= LEAST_ATTACKERS
    }
    if not fitted:
        raise DataError(
            f"no checkpoint is reached by {LEAST_BENIGN} honest principals and {LEAST_ATTACKERS} attackers; "
            f"give more streams of at least {CHECKPOINTS[0]} requests"
        )
    return fitted


def _model(honest_NF: NDArray[np.float64], hostile_NF: NDArray[np.float64], what: str) -> LevelModel:
    if len(honest_NF) < LEAST_BENIGN or len(hostile_NF) < LEAST_ATTACKERS:
        raise DataError(
            f"{what}: {len(honest_NF)} honest principals and {len(hostile_NF)} attackers are long enough; "
            f"{LEAST_BENIGN} and {LEAST_ATTACKERS} are needed"
        )
    normalises = np.arange(len(honest_NF)) % NORMALISER == 0
    return LevelModel.fit(honest_NF[~normalises], hostile_NF, honest_NF[normalises])
