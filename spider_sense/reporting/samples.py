"""Conversations to show when none are given: pairs of the shipped corpus that the guard was not fitted on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from spider_sense.corpus import load_evasion
from spider_sense.data import Example, digest
from spider_sense.errors import ConfigError, DataError
from spider_sense.training.config import TrainConfig
from spider_sense.training.parts import choose_parts

__all__ = ["samples"]

PAIRS = 3


def samples(training: Mapping[str, Any]) -> tuple[list[Example], str]:
    """Choose three pairs of a harmful and a benign prompt.

    The split of the training run is computed again from the manifest's record of it, and believed only if it has the
    digest that the manifest names.

    Args:
        training: ``manifest.training``.

    Returns:
        The rows, and in words where they come from.
    """
    kept = _kept_out(training)
    if kept is None:
        return _paired(load_evasion()), (
            "Pairs that come with the package and that no training run reads; the split of this guard's run could "
            "not be computed again here."
        )
    rows, part = kept
    return _paired(rows), f"Pairs of the shipped corpus from the {part} part of the training run; not trained on."


def _kept_out(training: Mapping[str, Any]) -> tuple[list[Example], str] | None:
    """Return corpus rows that nothing was fitted on, and the name of their part."""
    try:
        parts = choose_parts(TrainConfig.model_validate_json(json.dumps(training["config"])))
    except (KeyError, ValidationError, ConfigError, DataError):
        # Not an error: the files of the run may be on another machine.
        return None
    if digest(parts.examples) != training.get("data_digest"):
        return None
    tested = [row for rows in parts.test.values() for row in rows if row.source == "corpus_pairs"]
    rows = zip(parts.examples, parts.part.tolist(), strict=True)
    calibrated = [row for row, part in rows if part == "calibration" and row.source == "corpus_pairs"]
    found = [(tested, "test"), (calibrated, "calibration")]
    return next((item for item in found if item[0]), None)


def _paired(rows: Iterable[Example]) -> list[Example]:
    """Return the rows of up to three pairs of different categories, the first by hash, the harmful side first."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    whole = [group for group in groups.values() if {row.label for row in group} == {"harmful", "benign"}]
    whole.sort(key=lambda group: hashlib.sha256(group[0].group.encode()).hexdigest())
    by_category = {group[0].category: group for group in reversed(whole)}
    chosen = sorted(by_category.values(), key=whole.index)[:PAIRS]
    return [row for group in chosen for row in sorted(group, key=lambda row: row.label, reverse=True)]
