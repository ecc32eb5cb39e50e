"""What the bench compares, as YAML."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spider_sense.config import Settings
from spider_sense.extraction.simulator.campaigns import Cover, Start

__all__ = ["BenchConfig", "Cell", "Embedding", "Groups", "Parts"]

Embedding = Literal["hidden", "wordllama", "tfidf"]
"""What a detector sees of a text: the served model's activations, a static text embedding, or its words."""

Share = Annotated[float, Field(gt=0, le=1)]


class Groups(Settings):
    """Innocent groups in each part: so many of each kind of tenant, as many of it with one subject, and as many of all
    kinds together."""

    calibrate: int = Field(gt=0)
    test: int = Field(gt=0)


class Parts(Groups):
    """Principals of each kind of tenant in each part."""

    fit: int = Field(gt=0)


class Cell(Settings):
    """One way of attacking."""

    share: Share = 1.0
    cover: Cover = "same"
    start: Start = "first"

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{self.start} {self.share:g} {self.cover}"


class BenchConfig(Settings):
    """A comparison; ``$SPIDER_SENSE_DATA`` names the folder of prompt sets."""

    output: Path
    model: str = "smollm2"
    site: str = "resid.15"
    """Half of the blocks; not tuned."""
    texts: int = Field(gt=1)
    """Distinct texts of a family at most: what is computed once by the served model."""
    real_principals: int = Field(gt=3)
    """Real people at most, and each one's first ``real_messages``."""
    real_messages: int = Field(gt=16)
    longest: int = Field(default=400, gt=32)
    """Characters of a text from a file; longer ones are left out."""
    seeds: tuple[int, ...] = Field(min_length=1)
    principals: Parts
    length: int = Field(gt=24)
    """Requests of an innocent stream at most: as many as an attacker's, or thresholds would speak of shorter lives."""
    horizon: int = Field(default=0, ge=0)
    """Requests of the streams that are drawn on to one length; 0 leaves them out."""
    cells: tuple[Cell, ...] = Field(min_length=1)
    attackers: int = Field(gt=0)
    """Of each test campaign in each cell."""
    warm_up: int = Field(default=60, gt=0)
    after: int = Field(default=250, gt=0)
    """Requests after a campaign began that it may be found in."""
    late: int = Field(default=0, ge=0)
    """Innocent requests before a turn of an old account, whose life is longer than ``length``; 0 leaves it out."""
    organisations: Groups
    ring_sizes: tuple[int, ...] = (10,)
    """Accounts that a campaign is spread over."""
    group_requests: int = Field(default=32, gt=0)
    group_share: Share = 0.25
    embeddings: tuple[Embedding, ...] = ("hidden",)
    """Each is run on the first seed; the first one on all of them."""
    baselines: tuple[Embedding, ...] = ("hidden", "wordllama")
    """Those of the embeddings that baselines are run on."""
    adaptive: bool = True
    own_protocol: bool = True
    """Whether MMD's windows are run (arXiv 2606.05725)."""
    load_principals: int = Field(default=100_000, gt=0)
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Lifetime false alarms of a baseline."""
    resamples: int = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _lives_as_long(self) -> Self:
        longest = self.warm_up + self.after
        if self.length < longest:
            raise ValueError(
                f"length is {self.length}, and attackers send {longest} requests; give at least as many, "
                "or thresholds would speak of shorter lives"
            )
        return self

    @staticmethod
    def data() -> Path | None:
        """Return the folder of prompt sets, if the environment names one."""
        folder = os.environ.get("SPIDER_SENSE_DATA")
        return Path(folder) if folder else None
