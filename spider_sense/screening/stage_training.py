"""Train the probes of the stages on captured conversations, and say what they are worth on files they have not seen.

The probes are the solved families of `spider_sense.training.families`; the controls are those of every guard.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from pydantic import Field

from spider_sense.calibration import calibrate
from spider_sense.chat import Chat
from spider_sense.config import Settings
from spider_sense.data import digest
from spider_sense.errors import DataError
from spider_sense.evidence import evidence
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import SCHEMA_VERSION, Control, Detector, Guard, Manifest, Template
from spider_sense.labels import LabelledSet
from spider_sense.metrics import auroc, log_auroc, tpr_at_fpr
from spider_sense.models import LoadedModel
from spider_sense.resampling import auroc_interval
from spider_sense.scoring import Probe
from spider_sense.screening.stage_data import StageData
from spider_sense.screening.stage_guard import StageGuard
from spider_sense.splits import split
from spider_sense.training.controls import Controls
from spider_sense.training.families import fit
from spider_sense.training.options import FitOptions
from spider_sense.training.sweep import Candidate, Task, site_sets
from spider_sense.types import Site

__all__ = ["MadeStage", "StageOptions", "assembled", "crossed", "folded", "make_stage", "measure_files"]

FAMILIES = ("logistic", "mass_mean")
FRACTIONS = {"train": 0.75, "validation": 0.25}
WITH_CALIBRATION = {"train": 0.4, "validation": 0.2, "calibration": 0.4}
"""A file of five agents has one or more in each part."""


class StageOptions(Settings):
    """How the probes are made."""

    seed: int = Field(default=0, ge=0)
    suspect_fpr: float = 0.05
    breach_fpr: float = 0.01
    folds: int = Field(default=4, ge=2)
    """Folds of contexts, and as many of attacks, of :func:`crossed`."""


@dataclass(frozen=True, slots=True)
class MadeStage:
    """One probe with its record for the manifest and its controls."""

    probe: Probe
    record: Detector
    controls: tuple[Probe, ...]
    control_records: tuple[Control, ...]


def measure_files(stage: StageData, options: StageOptions) -> dict[str, dict[str, Any]]:
    """Leave each file out in turn: choose and fit a probe on the others, measure on it.

    Returns:
        By file and JSON-ready: :func:`spider_sense.evidence.evidence` with every control, ``interval``, the 95%
        interval of the AUROC over groups, ``family`` and ``sites``. The interval of the probe's rates is
        :func:`spider_sense.resampling.tpr_interval`. The groups are ``stage.owners``. A file of one class has no AUROC
        and is left out.
    """
    result = {}
    for source in dict.fromkeys(stage.sources.tolist()):
        test, train = np.flatnonzero(stage.sources == source), np.flatnonzero(stage.sources != source)
        both = [set(stage.labels[part].tolist()) == {False, True} for part in (test, train)]
        if all(both):
            result[source] = _measured(stage, train, test, options)
    return result


def crossed(stage: StageData, source: str, options: StageOptions) -> dict[str, Any]:
    """Split one file by context and by kind of attack at once, in folds of each; the other files are trained on too.

    Family and sites are chosen on the other files alone. For each pair of a fold of contexts and a fold of attacks, the
    probe sees neither: it is fitted on the rest of the file and the other files, and scores that pair's injected rows
    and a share of the clean rows of its contexts. The pairs' scores are pooled; every row of the file is scored once.

    Returns:
        As :func:`measure_files` of a file.
    """
    inside = stage.sources == source
    other = np.flatnonzero(~inside)
    parts = _parts(stage, other, FRACTIONS, options.seed)
    chosen = _choose(stage, parts["train"], parts["validation"])
    context = np.array([_fold(group, options) for group in stage.groups])
    # A clean row has no attack; its id says in which fold it is measured.
    attack = np.array([_fold(item.attack or item.example.id, options) for item in stage.examples])
    scored = []
    for row, column in product(range(options.folds), repeat=2):
        test = inside & (context == row) & (attack == column)
        train = ~inside | ((context != row) & (~stage.labels | (attack != column)))
        if test.any():
            scored.append(_scored(stage, chosen, np.flatnonzero(train), np.flatnonzero(test), options))
    return _pooled(stage, chosen, scored, options)


def folded(stage: StageData, source: str, options: StageOptions) -> dict[str, Any]:
    """Split one file into folds of what its groups are called up to a slash, such as an agent.

    Returns:
        As :func:`measure_files` of a file.
    """
    inside = stage.sources == source
    owner = np.array([_fold(name, options) for name in stage.owners])
    scored = []
    for fold in range(options.folds):
        test, train = (np.flatnonzero(inside & (owner == fold)), np.flatnonzero(~inside | (owner != fold)))
        if set(stage.labels[test].tolist()) == {False, True}:
            parts = _parts(stage, train, FRACTIONS, options.seed)
            chosen = _choose(stage, parts["train"], parts["validation"])
            scored.append(_scored(stage, chosen, train, test, options))
    return _pooled(stage, chosen, scored, options)


def make_stage(stage: StageData, left_out: np.ndarray, results: dict[str, Any], options: StageOptions) -> MadeStage:
    """Train and calibrate the probe that is served.

    Args:
        stage: its examples.
        left_out: bool [N], examples that nothing is trained, chosen or calibrated on.
        results: what goes into the manifest as evidence.
        options: how.

    Raises:
        DataError: if a part lacks a class.
    """
    used = np.flatnonzero(~left_out)
    parts = _parts(stage, used, WITH_CALIBRATION, options.seed)
    chosen = _choose(stage, parts["train"], parts["validation"])
    both = np.concatenate((parts["train"], parts["validation"]))
    probe = _fit(stage, chosen, both)
    controls = _controls(stage, both, probe, options)
    benign = parts["calibration"][~stage.labels[parts["calibration"]]]
    scores = stage.scores([probe], benign)[:, 0]
    names = [stage.data.ids[index] for index in benign]
    record = Detector(
        name=stage.name,
        family=probe.family,
        sites=tuple(map(str, probe.maps)),
        aggregator=probe.aggregator,
        calibration=calibrate(scores, stage.tokens[benign], names, options.suspect_fpr, options.breach_fpr),
        evidence=results | {"data_digest": digest([stage.examples[index].example for index in used])},
    )
    records = tuple(
        Control(
            name=item.name,
            detector=stage.name,
            family=item.family,
            sites=tuple(map(str, item.maps)),
            aggregator=item.aggregator,
        )
        for item in controls.probes
    )
    return MadeStage(probe, record, controls.probes, records)


def assembled(loaded: LoadedModel, made: Sequence[MadeStage], training: dict[str, Any]) -> StageGuard:
    """Put probes into a guard.

    Args:
        loaded: the model that they were trained on.
        made: one a stage, and drift.
        training: what they were trained on, for the manifest.
    """
    chat = Chat(loaded.tokenizer)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(loaded),
        template=Template(head=chat.head, tail=chat.tail),
        detectors=tuple(item.record for item in made),
        controls=tuple(record for item in made for record in item.control_records),
        certified=(serving_config(loaded.model),),
        training=training,
        probes_digest="",
    )
    probes = tuple(item.probe for item in made)
    return StageGuard(Guard(manifest, probes, tuple(probe for item in made for probe in item.controls)))


@dataclass(frozen=True, slots=True)
class _Scored:
    """Rows that were scored, and what scored them."""

    rows: np.ndarray
    scores: dict[str, np.ndarray]
    """Of the probe, ``guard``, and of each control."""


def _measured(stage: StageData, train: np.ndarray, test: np.ndarray, options: StageOptions) -> dict[str, Any]:
    """Choose and fit on some rows, measure on others."""
    parts = _parts(stage, train, FRACTIONS, options.seed)
    chosen = _choose(stage, parts["train"], parts["validation"])
    return _pooled(stage, chosen, [_scored(stage, chosen, train, test, options)], options)


def _scored(stage: StageData, chosen: Candidate, train: np.ndarray, test: np.ndarray, options: StageOptions) -> _Scored:
    probe = _fit(stage, chosen, train)
    controls = _controls(stage, train, probe, options)
    scores_NH = stage.scores([probe, *controls.probes], test)
    texts = [stage.texts[index] for index in test]
    scores = {"guard": scores_NH[:, 0], "length": controls.length.scores(texts), "tfidf": controls.tfidf.scores(texts)}
    scores |= {item.family: scores_NH[:, 1 + place] for place, item in enumerate(controls.probes)}
    return _Scored(test, scores)


def _pooled(stage: StageData, chosen: Candidate, scored: Sequence[_Scored], options: StageOptions) -> dict[str, Any]:
    """Return, JSON-ready, :func:`spider_sense.evidence.evidence` of all rows with every control, ``interval``, the 95%
    interval of the AUROC over groups, and what was chosen."""
    rows = np.concatenate([item.rows for item in scored])
    scores = {name: np.concatenate([item.scores[name] for item in scored]) for name in scored[0].scores}
    guard, labels = scores.pop("guard"), stage.labels[rows]
    # Rows of one agent are no independent evidence, whatever the attack.
    groups = [stage.owners[index] for index in rows]
    interval = auroc_interval(guard, labels, groups, seed=options.seed)
    assert interval is not None
    return {
        **evidence(guard, labels, scores, groups),
        "interval": {"low": interval.low, "high": interval.high},
        "family": chosen.probe.family,
        "sites": [str(site) for site in chosen.sites],
    }


def _parts(stage: StageData, rows: np.ndarray, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    examples = tuple(replace(stage.examples[index].example, group=stage.owners[index]) for index in rows)
    place = {example.id: int(index) for example, index in zip(examples, rows, strict=True)}
    parts = split(LabelledSet(examples=examples, labels=stage.labels[rows]), fractions, seed)
    found = {name: np.array([place[example.id] for example in part.examples]) for name, part in parts.items()}
    for name, part in found.items():
        if name != "calibration" and set(stage.labels[part].tolist()) != {False, True}:
            raise DataError(f"the {name} part of {stage.name} has one class alone of {len(part)} rows; add examples")
    return found


def _choose(stage: StageData, train: np.ndarray, validation: np.ndarray) -> Candidate:
    """Return the best family and sites: each site alone, a spread of four, all."""
    labels = stage.labels[validation]

    def attempt(family: str, sites: tuple[Site, ...]) -> Candidate:
        probe = fit(family, stage.data, train, stage.labels, sites, stage.name, FitOptions())
        scores = stage.scores([probe], validation)[:, 0]
        area, log_area, tpr = auroc(scores, labels), log_auroc(scores, labels), tpr_at_fpr(scores, labels, 0.01)
        assert area is not None
        assert log_area is not None
        assert tpr.tpr.value is not None
        return Candidate(probe, sites, area, log_area, tpr.tpr.value)

    tried = [attempt(family, (site,)) for family in FAMILIES for site in stage.data.sites]
    best = max(tried, key=lambda item: item.auroc)
    sets = [where for where in site_sets(stage.data.sites, best.sites) if len(where) > 1]
    tried += [attempt(family, where) for family in FAMILIES for where in sets]
    # A validation part of some hundred rows has few false positives to rank by, so the whole curve ranks.
    return max(tried, key=lambda item: item.auroc)


def _fit(stage: StageData, chosen: Candidate, rows: np.ndarray) -> Probe:
    return fit(chosen.probe.family, stage.data, rows, stage.labels, chosen.sites, stage.name, FitOptions())


def _controls(stage: StageData, rows: np.ndarray, probe: Probe, options: StageOptions) -> Controls:
    task = Task(stage.data, stage.labels, rows, rows, stage.name)
    return Controls.fit([item.example for item in stage.examples], task, probe, FitOptions(seed=options.seed))


def _fold(name: str, options: StageOptions) -> int:
    return hashlib.sha256(f"{options.seed}:{name}".encode()).digest()[0] % options.folds
