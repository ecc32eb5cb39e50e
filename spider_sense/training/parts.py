"""Which conversations a training run uses, and for what."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np

from spider_sense.corpus import load_corpus
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.labels import NEGATIVE, LabelledSet, labelled
from spider_sense.splits import split
from spider_sense.training.config import DetectorConfig, TrainConfig, read_sets
from spider_sense.training.overlap import overlapping

__all__ = ["Parts", "choose_parts"]

WITH_TEST_FILES = {"train": 0.6, "validation": 0.15, "calibration": 0.25}
WITHOUT_TEST_FILES = {"train": 0.5, "validation": 0.12, "calibration": 0.25, "test": 0.13}


@dataclass(frozen=True, slots=True)
class Parts:
    """The conversations of a run.

    Ids are ``source/id``, unique over all files. No text occurs twice, and none outside the test part overlaps one
    within; see :func:`spider_sense.training.overlap.overlapping`.
    """

    examples: tuple[Example, ...]
    """Training, validation and calibration conversations, N of them."""
    part: np.ndarray
    """Name of each one's part, [N]."""
    test: dict[str, list[Example]]
    """Test conversations by file."""
    dropped: int
    """Rows left out because their text, or half of it, was elsewhere already."""

    def labels(self, detector: DetectorConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return which conversations a detector uses [N] and which of them are positive [N]."""
        classes = [detector.label_map.label(example) for example in self.examples]
        return np.array([label is not None for label in classes]), np.array([bool(label) for label in classes])

    def respond(self, config: TrainConfig) -> dict[str, int]:
        """Choose the conversations that get a response: of each detector benign ones to calibrate on, both classes to
        train on."""
        if not config.respond:
            return {}
        chosen = (index for detector in config.detectors for index in self._answered(detector, config))
        return {self.examples[index].id: config.respond for index in chosen}

    def _answered(self, detector: DetectorConfig, config: TrainConfig) -> list[int]:
        used, positive = self.labels(detector)
        ordinary = np.array([example.source not in config.hard for example in self.examples])
        order = np.array([_hash(example.id, config.seed) for example in self.examples]).argsort()
        chosen: list[int] = []
        for part, wanted, count in (
            ("calibration", ~positive & ordinary, config.responses),
            ("train", ~positive, config.responses // 4),
            ("train", positive, config.responses // 4),
        ):
            chosen += [index for index in order if used[index] and wanted[index] and self.part[index] == part][:count]
        return chosen


def choose_parts(config: TrainConfig) -> Parts:
    """Read the prompt sets of a run and split them.

    Raises:
        ConfigError, DataError: see :func:`spider_sense.training.config.read_sets`.
        DataError: if a detector lacks a class in any part, or most rows of a file overlap the test part.
    """
    test = {name: _named(rows) for name, rows in read_sets(config.test).items()}
    files = read_sets(config.data, without=config.test)
    rows = [example for examples in files.values() for example in _capped(examples, config)]
    rows = _named([*(load_corpus() if config.corpus else []), *rows])
    known = frozenset(label for item in config.detectors for label in (*item.positive, *item.negative))
    rows = [row for row in rows if row.label in known]
    kept = _unseen(rows, {_key(row) for part in test.values() for row in part})
    for detector in config.detectors:
        labelled(kept, detector.label_map)
    placed = _split(kept, WITH_TEST_FILES if test else WITHOUT_TEST_FILES, config.seed)
    drawn = placed.pop("test", ())
    for example in drawn:
        test.setdefault(example.source, []).append(example)
    names = [name for name, members in placed.items() for _ in members]
    examples = [example for members in placed.values() for example in members]
    apart = _apart(examples, [row for members in test.values() for row in members])
    dropped = len(rows) - len(drawn) - int(apart.sum())
    parts = Parts(tuple(compress(examples, apart)), np.array(names)[apart], test, dropped)
    for detector in config.detectors:
        _check_parts(parts, detector)
    return parts


def _check_parts(parts: Parts, detector: DetectorConfig) -> None:
    """Check what a run would only find out at its end."""
    used, positive = parts.labels(detector)
    for name in ("train", "validation", "calibration"):
        members = positive[used & (parts.part == name)]
        # Nothing but benign rows is calibrated on.
        lacking = "negative" if members.all() else "positive" if name != "calibration" and not members.any() else None
        if lacking is not None:
            raise DataError(
                f"the {name} part has no {lacking} example for {detector.name}: of {len(parts.examples)} rows to train "
                f"on, {len(members)} are in it; add rows to the prompt sets"
            )
    try:
        labelled([example for rows in parts.test.values() for example in rows], detector.label_map)
    except DataError as error:
        raise DataError(f"the test part for {detector.name}: {error}") from error


def _split(rows: Sequence[Example], fractions: Mapping[str, float], seed: int) -> dict[str, tuple[Example, ...]]:
    # A split stratifies by class; with several detectors the label itself stands in for it.
    positives = np.array([row.label not in NEGATIVE for row in rows])
    parts = split(LabelledSet(examples=tuple(rows), labels=positives), fractions, seed)
    return {name: part.examples for name, part in parts.items()}


def _capped(rows: Sequence[Example], config: TrainConfig) -> list[Example]:
    return sorted(rows, key=lambda row: _hash(row.id, config.seed))[: config.cap]


def _named(rows: Iterable[Example]) -> list[Example]:
    return [replace(row, id=f"{row.source}/{row.id}") for row in rows]


def _unseen(rows: Sequence[Example], seen: set[str]) -> list[Example]:
    """Drop rows whose text was seen; a pair loses both halves, so that topics stay matched."""
    repeated: set[str] = set()
    for row in rows:
        if _key(row) in seen:
            repeated.add(row.group)
        seen.add(_key(row))
    return [row for row in rows if row.group not in repeated]


def _apart(rows: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Return which rows [N] overlap no test row; a pair goes as a whole here, too.

    Raises:
        DataError: if most rows of a file do.
    """
    groups = {rows[index].group for index in overlapping(list(map(_said, rows)), list(map(_said, test)))}
    apart = np.array([row.group not in groups for row in rows], dtype=bool)
    sources = np.array([row.source for row in rows])
    for source in np.unique(sources).tolist():
        kept = apart[sources == source]
        if 2 * np.count_nonzero(kept) < len(kept):
            raise DataError(
                f"{len(kept) - np.count_nonzero(kept)} of {len(kept)} rows of {source} share half of their text, or of "
                "a test row's, with a test row; leave the file out, or take what all its rows begin with out of them "
                "(a system prompt belongs into `messages`, where it is not compared)"
            )
    return apart


def _said(row: Example) -> str:
    """Return what is compared: all but a system prompt, which rows of different content share."""
    return row.text if row.turns is None else "\n".join(content for role, content in row.turns if role != "system")


def _key(row: Example) -> str:
    return " ".join(row.text.lower().split())


def _hash(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
