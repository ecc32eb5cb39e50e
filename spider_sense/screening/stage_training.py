"""Train the probes of the stages on captured conversations, and say what they are worth on files they have not seen.

The probes are the solved families of `spider_sense.training.families`; the controls are those of every guard.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from spider_sense.calibration import calibrate
from spider_sense.config import Settings
from spider_sense.data import LabelledSet, digest, split
from spider_sense.errors import DataError
from spider_sense.evidence import evidence
from spider_sense.guard import Control, Detector
from spider_sense.metrics import auroc, auroc_interval, log_auroc, tpr_at_fpr
from spider_sense.scoring import Probe
from spider_sense.screening.stage_data import StageData
from spider_sense.training.controls import Controls
from spider_sense.training.families import fit
from spider_sense.training.options import FitOptions
from spider_sense.training.sweep import Candidate, Task, site_sets
from spider_sense.types import Site

__all__ = ["MadeStage", "StageOptions", "crossed", "make_stage", "measure_files"]

FAMILIES = ("logistic", "mass_mean")
FRACTIONS = {"train": 0.75, "validation": 0.25}
WITH_CALIBRATION = {"train": 0.5, "validation": 0.15, "calibration": 0.35}


class StageOptions(Settings):
    """How the probes are made."""

    seed: int = Field(default=0, ge=0)
    suspect_fpr: float = 0.05
    breach_fpr: float = 0.01


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
        By file, as :func:`_measured`; files with one class alone are left out, they have no AUROC.
    """
    result = {}
    for source in dict.fromkeys(stage.sources.tolist()):
        test, train = np.flatnonzero(stage.sources == source), np.flatnonzero(stage.sources != source)
        both = [set(stage.labels[part].tolist()) == {False, True} for part in (test, train)]
        if all(both):
            result[source] = _measured(stage, train, test, options)
    return result


def crossed(stage: StageData, source: str, options: StageOptions) -> dict[str, Any]:
    """Split one file by context and by kind of attack at once; the other files are trained on as well.

    A harmful row of a training context with a test attack, or the other way round, is in neither part.

    Returns:
        As :func:`_measured`.
    """
    train, test = [], []
    for index, item in enumerate(stage.examples):
        if item.example.source != source:
            train.append(index)
            continue
        sides = {_half(item.example.group, options.seed), _half(item.attack or item.example.group, options.seed)}
        if len(sides) == 1:
            (train, test)[sides.pop()].append(index)
    return _measured(stage, np.array(train), np.array(test), options)


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


def _measured(stage: StageData, train: np.ndarray, test: np.ndarray, options: StageOptions) -> dict[str, Any]:
    """Choose and fit on some rows, measure on others.

    Returns:
        JSON-ready: :func:`spider_sense.evidence.evidence` with every control, ``interval`` with the 95% interval of the
        AUROC over groups, and what was chosen.
    """
    parts = _parts(stage, train, FRACTIONS, options.seed)
    chosen = _choose(stage, parts["train"], parts["validation"])
    probe = _fit(stage, chosen, train)
    controls = _controls(stage, train, probe, options)
    scores_NH = stage.scores([probe, *controls.probes], test)
    labels, texts = stage.labels[test], [stage.texts[index] for index in test]
    others = {"length": controls.length.scores(texts), "tfidf": controls.tfidf.scores(texts)}
    others |= {item.family: scores_NH[:, 1 + place] for place, item in enumerate(controls.probes)}
    interval = auroc_interval(scores_NH[:, 0], labels, [stage.groups[index] for index in test], seed=options.seed)
    assert interval is not None
    return {
        **evidence(scores_NH[:, 0], labels, others),
        "interval": {"low": interval.low, "high": interval.high},
        "family": probe.family,
        "sites": [str(site) for site in probe.maps],
    }


def _parts(stage: StageData, rows: np.ndarray, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    examples = tuple(stage.examples[index].example for index in rows)
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


def _half(name: str, seed: int) -> int:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()[0] % 2
