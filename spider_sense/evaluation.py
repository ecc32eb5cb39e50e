"""Evaluate a guard on prompt sets: per file and overall, with its controls on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spider_sense.baselines import LengthBaseline, TfidfBaseline, load_baselines
from spider_sense.calibration import Calibration
from spider_sense.data import Example
from spider_sense.errors import GuardError
from spider_sense.evidence import evidence
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import BASELINES, Guard
from spider_sense.labels import LabelMap, labelled
from spider_sense.metrics import roc_points
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples

__all__ = ["OVERALL", "detector_labels", "evaluate", "evaluate_folder", "file_results"]

OVERALL = "overall"


def evaluate_folder(
    folder: Path,
    loaded: LoadedModel,
    sets: Mapping[str, Sequence[Example]],
    label_map: LabelMap,
    detector: str | None = None,
    allow_uncertified: bool = False,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the guard in a folder; see :func:`evaluate`.

    Args:
        folder: the guard.
        loaded: the model it was made for.
        sets: rows by file.
        label_map: which labels are positive and negative.
        detector: name of the detector; by default the guard's first.
        allow_uncertified: evaluate in another serving configuration than the guard was calibrated in.
        advance: called with the number of prompts that have just been scored.

    Raises:
        DataError: if the whole set lacks a class, or the guard has no such detector.
        MismatchError: if the guard was made for another model.
    """
    guard = Guard.from_pretrained(folder)
    guard.check_model(fingerprint(loaded), serving_config(loaded.model), allow_uncertified)
    index = guard.manifest.index(detector)
    baselines = load_baselines(folder / BASELINES / guard.manifest.detectors[index].name)
    return evaluate(guard, index, baselines, loaded, sets, label_map, advance)


def detector_labels(folder: Path, detector: str | None = None) -> LabelMap:
    """Return the labels that a detector was trained to tell apart; by default those of the guard's first detector.

    Raises:
        GuardError: if the guard is not one of `spider-sense train`, such as one of an agent's stages.
    """
    manifest = Guard.from_pretrained(folder).manifest
    name = manifest.detectors[manifest.index(detector)].name
    if "config" not in manifest.training:
        raise GuardError(
            f"the detector {name!r} of {folder} was not made by `spider-sense train`, so no prompt set has its labels; "
            "give `eval` a guard of whole requests. What probes of an agent's stages find in recorded conversations "
            "says `spider-sense screen`"
        )
    config = next(item for item in manifest.training["config"]["detectors"] if item["name"] == name)
    return LabelMap(positive=frozenset(config["positive"]), negative=frozenset(config["negative"]))


def evaluate(
    guard: Guard,
    index: int,
    baselines: tuple[LengthBaseline, TfidfBaseline],
    loaded: LoadedModel,
    sets: Mapping[str, Sequence[Example]],
    label_map: LabelMap,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score prompt sets with one detector of a guard and with its controls.

    Returns:
        JSON-ready: ``files`` by name and ``overall``, each as :func:`file_results`; ``groups`` compares the positives
        with ordinary benign rows and with those of the sources that the training configuration calls hard;
        ``ignored`` counts rows whose label is neither positive nor negative.
    """
    rows = [example for examples in sets.values() for example in examples]
    chosen = labelled(rows, label_map)
    record = guard.manifest.detectors[index]
    controls = [
        probe
        for probe, item in zip(guard.controls, guard.manifest.controls, strict=True)
        if item.detector == record.name
    ]
    scored = score_examples(loaded, [guard.probes[index], *controls], chosen.examples, advance=advance)
    texts = [example.text for example in chosen.examples]
    length, tfidf = baselines
    scores = {"guard": scored.peak_NH[:, 0], "length": length.scores(texts), "tfidf": tfidf.scores(texts)}
    scores |= {probe.family: scored.peak_NH[:, 1 + place] for place, probe in enumerate(controls)}
    sources = np.array([example.source for example in chosen.examples])
    groups = np.array([example.group for example in chosen.examples])

    def results(where: np.ndarray) -> dict[str, Any]:
        return file_results(scores, chosen.labels, scored.tokens, groups, record.calibration, where)

    hard = np.isin(sources, guard.manifest.training.get("config", {}).get("hard", []))
    return {
        "detector": record.name,
        "files": {str(name): results(sources == name) for name in dict.fromkeys(sources.tolist())},
        OVERALL: {
            **results(np.ones(len(sources), dtype=bool)),
            "roc": {name: _low_roc(values, chosen.labels) for name, values in scores.items()},
        },
        "groups": {name: results(where) for name, where in _comparisons(chosen.labels, hard).items()},
        "ignored": {"rows": chosen.ignored, "labels": dict(chosen.ignored_labels)},
    }


def _comparisons(labels: np.ndarray, hard: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of each comparison: the same positives against ordinary and against hard benign rows."""
    positives = labels & ~hard
    found = {"ordinary benign": positives | (~labels & ~hard), "hard benign": positives | (~labels & hard)}
    return {name: where for name, where in found.items() if (labels & where).any() and (~labels & where).any()}


def file_results(
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    tokens: np.ndarray,
    groups: np.ndarray,
    calibration: Calibration,
    where: np.ndarray,
) -> dict[str, Any]:
    """Measure some of the rows.

    Args:
        scores: [N] of the guard and of each control.
        labels: [N].
        tokens: [N] prompt lengths, which choose the threshold.
        groups: [N] names; rows of a group are no independent evidence.
        calibration: the detector's thresholds.
        where: [N] bool, the rows to measure.

    Returns:
        The detector's :func:`spider_sense.evidence.evidence` and ``at_thresholds``: the false and true
        positive rate at the guard's own thresholds, of prompts alone. A threshold's own rate is of conversations with
        their answers, in which a running maximum can only grow.
    """
    part = {name: values[where] for name, values in scores.items()}
    guard_scores = part.pop("guard")
    return {
        **evidence(guard_scores, labels[where], part, groups[where].tolist()),
        "at_thresholds": calibration.rates(guard_scores, labels[where], tokens[where]),
    }


def _low_roc(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """Return the points of the ROC up to 10% false positives, at most 200 of them."""
    fpr, tpr = roc_points(scores, labels)
    low = np.flatnonzero(fpr <= 0.1)
    picked = low[np.unique(np.linspace(0, len(low) - 1, 200).astype(int))]
    return [(round(float(fpr[index]), 5), round(float(tpr[index]), 5)) for index in picked]
