"""What a training run is told, in YAML."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from spider_sense.config import Settings
from spider_sense.data import Example, read_jsonl
from spider_sense.errors import ConfigError
from spider_sense.labels import MISUSE, LabelMap
from spider_sense.models import Dtype
from spider_sense.training.families import FAMILIES
from spider_sense.training.options import FitOptions
from spider_sense.types import Site

__all__ = ["DetectorConfig", "TrainConfig", "read_sets"]


class DetectorConfig(Settings):
    """One detector to train."""

    name: str = Field(default="misuse", pattern=r"^[a-z][a-z0-9_]*$")
    positive: tuple[str, ...] = tuple(sorted(MISUSE.positive))
    """Labels that the detector is to find."""
    negative: tuple[str, ...] = tuple(sorted(MISUSE.negative))
    """Labels that it must leave alone; rows with any other label are ignored."""

    @property
    def label_map(self) -> LabelMap:
        """The two sets of labels as the data floor reads them."""
        return LabelMap(positive=frozenset(self.positive), negative=frozenset(self.negative))


class TrainConfig(Settings):
    """A training run."""

    model: str = "smollm2"
    """Hub id, folder or .gguf file; ``smollm2`` is the packaged SmolLM2-135M-Instruct."""
    dtype: Dtype = "float32"
    device: str = "cpu"
    corpus: bool = True
    """Whether to train on the shipped contrast set."""
    data: tuple[str, ...] = ()
    """Further prompt sets: JSONL files or patterns; variables such as ``$SPIDER_SENSE_DATA`` are filled in."""
    test: tuple[str, ...] = ()
    """Prompt sets that nothing is trained, chosen or calibrated on; without any, a part of the corpus is kept."""
    cap: int = Field(default=1000, ge=1)
    """Rows taken of each file of ``data``, the first by hash; test files are read whole."""
    hard: tuple[str, ...] = ("corpus_pairs", "corpus_special")
    """Sources whose benign rows were made to look like misuse. They are trained and tested on; thresholds describe
    ordinary traffic, so nothing is calibrated on them."""
    detectors: tuple[DetectorConfig, ...] = Field(default=(DetectorConfig(),), min_length=1)
    sites: tuple[str, ...] = ()
    """Sites to sweep; by default resid at eight depths."""
    families: tuple[str, ...] = FAMILIES
    fit: FitOptions = FitOptions()
    respond: int = Field(default=32, ge=0)
    """Tokens of response that the model generates for some conversations."""
    responses: int = Field(default=160, ge=0)
    """Benign conversations of the calibration part that get a response, of each detector; a quarter as many of either
    class of the training part."""
    max_tokens: int = Field(default=384, ge=32)
    suspect_fpr: float = 0.05
    breach_fpr: float = 0.01
    seed: int = Field(default=0, ge=0)
    output: Path = Path("guard")
    """Folder of the guard."""
    work: Path = Path("runs/train")
    """Folder of the captured activations; a run that was stopped resumes from it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"unknown probe family {family!r}; known: {', '.join(FAMILIES)}")
        for site in self.sites:
            Site.parse(site)
        if not self.corpus and not self.data:
            raise ValueError("there is nothing to train on; set corpus: true or name files under data")
        return self


def read_sets(
    patterns: tuple[str, ...], require_label: bool = True, without: tuple[str, ...] = ()
) -> dict[str, list[Example]]:
    """Read prompt sets by file stem.

    Args:
        patterns: paths, in which variables are filled in and ``*`` matches.
        require_label: whether a row without a label is an error.
        without: paths of the same kind that are left out where ``patterns`` match them too.

    Raises:
        ConfigError: if a variable is not set, a pattern matches nothing, or two files have the same stem.
        DataError: if a file cannot be read as a prompt set.
    """
    apart = {file.stem: file.resolve() for file in _matching(without)}
    files: dict[str, Path] = {}
    for file in _matching(patterns):
        if file.stem in files or apart.get(file.stem, file.resolve()) != file.resolve():
            raise ConfigError(f"two files are called {file.stem!r}; rename one, results are listed by that name")
        files[file.stem] = file
    return {stem: read_jsonl(file, require_label) for stem, file in files.items() if stem not in apart}


def _matching(patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        path = os.path.expandvars(os.path.expanduser(pattern))
        if "$" in path:
            raise ConfigError(
                f"{pattern!r} names an environment variable that is not set; export it, or write the path"
            )
        files = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not files:
            raise ConfigError(f"{pattern!r} matches no file; name JSONL files")
        yield from map(Path, files)
