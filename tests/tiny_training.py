"""A training run that takes a second: sixty rows of words that mean nothing, and a tiny random model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from spider_sense.models import LoadedModel
from spider_sense.training.config import TrainConfig
from spider_sense.training.train import Trained, train

TRAIN_FILE, TEST_FILE = "traffic", "held_out"
_HARMFUL, _BENIGN, _SHARED = range(14), range(14, 32), range(32, 46)


class TinyRun(NamedTuple):
    """A finished run."""

    loaded: LoadedModel
    config: TrainConfig
    trained: Trained

    @property
    def folder(self) -> Path:
        """The guard; copy it before changing it."""
        return self.config.output


def rows(count: int, seed: int, pairs: int = 0) -> list[dict[str, Any]]:
    """Return as many harmful as benign rows, the first ``pairs`` of each kind in pairs."""
    draw = Random(seed)
    result = []
    for index in range(count // 2):
        pair = {"pair": index} if index < pairs else {}
        for label, words in (("harmful", _HARMFUL), ("benign", _BENIGN)):
            result.append({"id": f"{label}-{index}", "text": text(draw, words), "label": label, **pair})
    return result


def text(draw: Random, words: Sequence[int] = _BENIGN) -> str:
    """Return some words of a kind and some that both kinds share, by default a benign text."""
    chosen = [*draw.choices(words, k=draw.randint(3, 8)), *draw.choices(_SHARED, k=draw.randint(2, 6))]
    draw.shuffle(chosen)
    return " ".join(f"w{word}" for word in chosen)


def write_rows(path: Path, content: Sequence[Mapping[str, Any]]) -> Path:
    """Write a prompt set."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Return the configuration of a run in ``folder``, whose prompt sets are written if they are not there."""
    if not (folder / f"{TRAIN_FILE}.jsonl").exists():
        training, held_out = rows(64, seed=1, pairs=10), rows(24, seed=2)
        # A text of the test file that the training file has as well, once in a pair and once alone.
        held_out[0]["text"], held_out[1]["text"] = training[0]["text"], training[-1]["text"]
        write_rows(folder / f"{TRAIN_FILE}.jsonl", training)
        write_rows(folder / f"{TEST_FILE}.jsonl", held_out)
    settings: dict[str, Any] = {
        "model": "org/tiny",
        "corpus": False,
        "data": (str(folder / f"{TRAIN_FILE}.jsonl"),),
        "test": (str(folder / f"{TEST_FILE}.jsonl"),),
        "sites": ("resid.0", "resid.1"),
        "families": ("logistic", "attention"),
        "respond": 4,
        "output": folder / "guard",
        "work": folder / "work",
    }
    return TrainConfig(**(settings | changes))


def run(folder: Path, loaded: LoadedModel) -> TinyRun:
    """Train a guard in ``folder``."""
    chosen = config(folder)
    return TinyRun(loaded, chosen, train(chosen, loaded=loaded))
