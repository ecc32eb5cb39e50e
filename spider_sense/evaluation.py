"""Evaluate a guard on prompt sets: per file and overall, with its controls on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spider_sense.baselines import LengthBaseline, TfidfBaseline, load_baselines
from spider_sense.calibration import Calibration
from spider_sense.data import Example, LabelMap, labelled
from spider_sense.errors import DataError
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import BASELINES, Guard
from spider_sense.metrics import rate_above
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples
from spider_sense.training.evidence import evidence

__all__ = ["OVERALL", "evaluate", "evaluate_folder", "file_results"]

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
    names = [item.name for item in guard.manifest.detectors]
    name = detector or names[0]
    if name not in names:
        raise DataError(f"the guard has no detector {name!r}; it has: {', '.join(names)}")
    baselines = load_baselines(folder / BASELINES / name)
    return evaluate(guard, names.index(name), baselines, loaded, sets, label_map, advance)


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
        JSON-ready: ``files`` by name and ``overall``, each as :func:`file_results`; ``ignored`` counts rows whose label
        is neither positive nor negative.
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
    scores = {
        "guard": scored.peak_NH[:, 0],
        **{
            name: baseline.scores([example.text for example in chosen.examples])
            for name, baseline in zip(("length", "tfidf"), baselines, strict=True)
        },
        **{
            probe.family if probe.family == "random_direction" else "shuffled_labels": scored.peak_NH[:, 1 + place]
            for place, probe in enumerate(controls)
        },
    }
    sources = np.array([example.source for example in chosen.examples])
    return {
        "detector": record.name,
        "files": {
            str(name): file_results(scores, chosen.labels, scored.tokens, record.calibration, sources == name)
            for name in dict.fromkeys(sources.tolist())
        },
        OVERALL: file_results(
            scores, chosen.labels, scored.tokens, record.calibration, np.ones(len(sources), dtype=bool)
        ),
        "ignored": {"rows": chosen.ignored, "labels": dict(chosen.ignored_labels)},
    }


def file_results(
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    tokens: np.ndarray,
    calibration: Calibration,
    where: np.ndarray,
) -> dict[str, Any]:
    """Measure some of the rows.

    Args:
        scores: [N] of the guard and of each control.
        labels: [N].
        tokens: [N] prompt lengths, which choose the threshold.
        calibration: the detector's thresholds.
        where: [N] bool, the rows to measure.

    Returns:
        The detector's :func:`spider_sense.training.evidence.evidence` and ``at_thresholds``: the false and true positive
        rate at the guard's own thresholds.
    """
    part = {name: values[where] for name, values in scores.items()}
    guard_scores = part.pop("guard")
    buckets = [calibration.thresholds(int(length)) for length in tokens[where]]
    return {
        **evidence(guard_scores, labels[where], part),
        "at_thresholds": {
            level: {
                rate: _rate(guard_scores - np.array([getattr(bucket, level).value for bucket in buckets]), side)
                for rate, side in (("fpr", ~labels[where]), ("tpr", labels[where]))
            }
            for level in ("suspect", "breach")
        },
    }


def _rate(margins: np.ndarray, side: np.ndarray) -> dict[str, float | None]:
    rate = rate_above(margins[side], 0.0)
    return {"value": rate.value, "low": rate.low, "high": rate.high}
