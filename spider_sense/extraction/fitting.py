"""Makes an extraction guard from logs: of honest principals, of campaigns, and of other honest principals.

Shape letters: N requests, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError
from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.checks import check_calibration, check_fit, check_widths
from spider_sense.extraction.encode import Encoder, Read, hidden_of
from spider_sense.extraction.event import Event
from spider_sense.extraction.groups import honest_groups
from spider_sense.extraction.keys import Key
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.population import Population
from spider_sense.extraction.probes import crossed, once_each
from spider_sense.extraction.rows import Row, streams_of
from spider_sense.extraction.sketch import Sketch
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.thresholds import Budget, Calibration
from spider_sense.extraction.tiers import TieredDetector
from spider_sense.fingerprint import Fingerprint
from spider_sense.types import Site

__all__ = ["calibrate", "events_of", "fit"]


def fit(
    benign: Sequence[Row],
    campaigns: Sequence[Row],
    key: Key,
    site: Site,
    *,
    width: int,
    read: Read | None = None,
    base: Fingerprint | None = None,
    lists: KnownLists | None = None,
) -> Artifact:
    """Fit sketch, probes and population; calibration comes after, on other principals.

    Args:
        benign: requests of honest principals; ``family`` may say what kind of work each does.
        campaigns: requests of attackers; each family gets a probe.
        key: hashes whatever is kept.
        site: where the hidden states were read, or will be.
        width: of the hidden state.
        read: runs the model; None if every row carries its hidden state.
        base: fingerprint of the model.
        lists: known query lists.

    Raises:
        DataError: see ``check_fit``.
        MissingExtraError: if scikit-learn or scipy is not installed.
    """
    check_fit(benign, campaigns, reads=read is not None)
    benign, campaigns = _in_order(benign), _in_order(campaigns)
    hidden_ND, count = hidden_of([*benign, *campaigns], read, width), len(benign)
    families = np.array([row.family for row in campaigns])
    attacks = {str(name): np.flatnonzero(families == name) + count for name in np.unique(families)}
    owners = [row.principal for row in benign]
    sketch = Sketch.fit(hidden_ND[:count], owners, {name: hidden_ND[rows] for name, rows in attacks.items()})
    encoder = Encoder(key, sketch, read, lists)
    whole = [
        row.model_copy(update={"hidden": tuple(hidden.tolist())})
        for row, hidden in zip(benign, hidden_ND[:count], strict=True)
    ]
    population = Population.fit(
        _streams(_crossed(encoder.encode(whole), hidden_ND, benign, attacks)), key, sketch.names
    )
    return Artifact(
        sketch=sketch,
        population=population,
        site=site,
        key_digest=key.digest,
        base=base,
        lists=lists,
        fitted=frozenset(map(key.seed, owners)),
    )


def _crossed(
    events: Sequence[Event],
    hidden_ND: NDArray[np.float32],
    benign: Sequence[Row],
    attacks: Mapping[str, NDArray[np.int64]],
) -> list[Event]:
    """Return the events as new principals' would be: their first probe is one that was fitted on other work."""
    first_N = crossed(
        hidden_ND[: len(benign)],
        once_each([row.principal for row in benign]),
        [row.family or row.principal for row in benign],
        {name: hidden_ND[rows] for name, rows in attacks.items()},
    )
    return [
        replace(event, probes=np.concatenate([[first], event.probes[1:]], dtype=np.float32))
        for event, first in zip(events, first_N, strict=True)
        if event.probes is not None
    ]


def calibrate(
    artifact: Artifact, benign: Sequence[Row], key: Key, *, read: Read | None = None, budget: Budget | None = None
) -> Artifact:
    """Set the thresholds on honest principals that the fit did not see.

    Groups that the linking finds among them are honest linked groups: organisations with several keys, resellers.
    ``family`` may say what kind of work a principal does.

    Raises:
        DataError: if there is no row; see ``check_calibration`` too.
        MismatchError: if the key is another one.
    """
    detector = artifact.detector(key)
    check_calibration(artifact, benign, key, reads=read is not None)
    events = events_of(artifact, benign, key, read)
    states, own, level = _replayed(detector, events)
    work = {row.principal: row.family or row.principal for row in benign}
    return artifact.calibrated(
        Calibration.fit(
            own,
            level,
            [state.tenant for state in states.values()],
            np.array([state.count for state in states.values()]),
            [work[name] for name in states],
            groups=honest_groups(states, artifact.population, {row.principal: row.family for row in benign}),
            floors=artifact.population.floors,
            budget=budget,
            unnamed=len({row.principal for row in benign if not row.family}),
        )
    )


def events_of(artifact: Artifact, rows: Sequence[Row], key: Key, read: Read | None = None) -> dict[str, list[Event]]:
    """Return every principal's events in the order of time.

    Raises:
        DataError: if there is no row, or one's activations have another length than the guard's.
        MismatchError: if the key is another one.
    """
    artifact.check_key(key)
    check_widths(rows, artifact.width, len(artifact.sketch.names))
    ordered = _in_order(rows)
    events = Encoder(key, artifact.sketch, read, artifact.lists).encode(ordered)
    return {stream[0].principal: stream for stream in _streams(events)}


def _in_order(rows: Sequence[Row]) -> list[Row]:
    if not rows:
        raise DataError("there is no request; give a log with at least one")
    return [row for stream in streams_of(list(rows)).values() for row in stream]


def _streams(events: Sequence[Event]) -> list[list[Event]]:
    streams: dict[str, list[Event]] = {}
    for event in events:
        streams.setdefault(event.principal, []).append(event)
    return list(streams.values())


def _replayed(
    detector: TieredDetector, streams: Mapping[str, Sequence[Event]]
) -> tuple[dict[str, PrincipalState], NDArray[np.float64], NDArray[np.float64]]:
    states_N = detector.replay(list(streams.values())).states
    states = {name: PrincipalState(states_N[row : row + 1]) for row, name in enumerate(streams)}
    return states, states_N["own"].copy(), states_N["level"].copy()
