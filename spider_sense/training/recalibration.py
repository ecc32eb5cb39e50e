"""Set a guard's thresholds anew, on the operator's own benign traffic and in the way the model is served there.

This is shadow mode: the model answers every prompt, the conversation is scored, and nothing is acted on.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from spider_sense.activations import ActivationSet
from spider_sense.calibration import Calibration
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.evaluation import detector_labels
from spider_sense.fingerprint import Fingerprint, ServingConfig, check_match, fingerprint, serving_config
from spider_sense.guard import BASELINES, KIND, Detector, Guard
from spider_sense.models import LoadedModel
from spider_sense.training.canaries import make_canaries
from spider_sense.training.collect import collect
from spider_sense.training.train import calibrate_probe

__all__ = ["Recalibrated", "benign_rows", "check_same_model", "recalibrate"]

SAME_DIGEST = ("float32", "bfloat16")
"""Dtypes that leave the weight digest as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalibrated:
    """What a calibration leaves behind."""

    guard: Guard
    folder: Path
    before: dict[str, Calibration]
    """The thresholds that were replaced, by detector."""


def benign_rows(folder: Path, sets: Mapping[str, Sequence[Example]]) -> list[Example]:
    """Return the rows to calibrate on, each text once, with ids ``source/id`` that are unique over all files.

    Args:
        folder: the guard; its detectors say which labels are positive.
        sets: rows by file; a row needs no label.

    Raises:
        DataError: if a row is labelled as something that a detector is to find, or there is no row.
        GuardError: if there is no sound guard in the folder.
    """
    rows = [row for examples in sets.values() for row in examples]
    for detector in Guard.from_pretrained(folder).manifest.detectors:
        labels = detector_labels(folder, detector.name)
        found = Counter(row.label for row in rows if labels.label(row))
        if found:
            raise DataError(
                f"{found.total()} of {len(rows)} rows are labelled as what {detector.name} is to find: {dict(found)}; "
                "calibrate on benign traffic alone, thresholds set on anything else let it through"
            )
    once: dict[object, Example] = {}
    for row in rows:
        once.setdefault((row.turns or row.text, row.response), row)
    return [replace(row, id=f"{row.source}/{row.id}") for row in once.values()]


def recalibrate(
    folder: Path,
    loaded: LoadedModel,
    rows: Sequence[Example],
    work: Path,
    *,
    out: Path | None = None,
    respond: int = 64,
    max_tokens: int = 2048,
    suspect_fpr: float = 0.05,
    breach_fpr: float = 0.01,
    progress: Progress | None = None,
) -> Recalibrated:
    """Set the thresholds of every detector and write the guard.

    Thresholds belong to the configuration that they were set in, so afterwards no other one is certified. The canaries
    are scored anew in it too.

    Args:
        folder: the guard.
        loaded: the model, served as it will be; its configuration need not be certified yet.
        rows: benign conversations; see :func:`benign_rows`.
        work: for the captured activations; a run that was stopped resumes from it.
        out: where to write the guard; by default it is replaced.
        respond: tokens of response to each prompt, the row's own or else the model's.
        max_tokens: longer prompts are cut in the middle.
        suspect_fpr: share of benign conversations that may be suspect or worse.
        breach_fpr: share of benign conversations that may be a breach.
        progress: gets a bar for the captured tokens.

    Raises:
        ConfigError: unless 0 < breach_fpr <= suspect_fpr < 1.
        DataError: if there is no row, or a score is not finite.
        GuardError: if there is no sound guard in the folder, or ``out`` holds something else than a guard.
        MismatchError: if the guard was made for another model.
    """
    KIND.check_replaceable(out or folder)
    guard = Guard.from_pretrained(folder)
    found, serving = fingerprint(loaded), serving_config(loaded.model)
    check_same_model(guard, found, serving)
    sites = tuple(sorted({site for probe in guard.probes for site in probe.maps}))
    data = collect(loaded, rows, sites, work, respond=respond, max_tokens=max_tokens, progress=progress)
    everything = np.arange(len(data.ids))
    detectors = tuple(
        _with_thresholds(record, calibrate_probe(probe, data, everything, suspect_fpr, breach_fpr))
        for record, probe in zip(guard.manifest.detectors, guard.probes, strict=True)
    )
    about = {"recalibrated_on": _provenance(rows, data, respond, guard.digest)}
    update = {
        "detectors": detectors,
        "certified": (serving,),
        "fingerprint": found,
        "training": guard.manifest.training | about,
        "canaries": make_canaries(loaded, guard.probes),
    }
    _write(replace(guard, manifest=guard.manifest.model_copy(update=update)), folder, out or folder)
    before = {record.name: record.calibration for record in guard.manifest.detectors}
    return Recalibrated(guard=Guard.from_pretrained(out or folder), folder=out or folder, before=before)


def check_same_model(guard: Guard, found: Fingerprint, serving: ServingConfig) -> None:
    """Check that a guard was made for this model, however it is served.

    Raises:
        MismatchError: with both values.
    """
    guard.check_model(found, serving, allow_uncertified=True)
    kinds = {(config.quantization, config.adapters) for config in (serving, *guard.manifest.certified)}
    dtypes = {config.dtype for config in (serving, *guard.manifest.certified)}
    if len(kinds) == 1 and dtypes <= set(SAME_DIGEST):
        check_match(guard.manifest.fingerprint, found)


def _with_thresholds(record: Detector, calibration: Calibration) -> Detector:
    """Replace the thresholds; drop the test rates at the old ones from the evidence."""
    return record.model_copy(
        update={"calibration": calibration, "evidence": _without(record.evidence, "at_thresholds")}
    )


def _without(evidence: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        key: _without(value, name) if isinstance(value, Mapping) else value
        for key, value in evidence.items()
        if key != name
    }


def _provenance(rows: Sequence[Example], data: ActivationSet, respond: int, replaces: str) -> dict[str, Any]:
    return {
        "sources": sorted({row.source for row in rows}),
        "conversations": len(rows),
        "with_response": int((np.diff(data.starts) > data.prompt_rows).sum()),
        "respond": respond,
        "replaces": replaces,
    }


def _write(guard: Guard, source: Path, folder: Path) -> None:
    with KIND.staged(folder) as beside:
        if (source / BASELINES).is_dir():
            shutil.copytree(source / BASELINES, beside / BASELINES)
        guard.write_into(beside)
