"""Where the detector of extraction is, and where it keeps what it knows of principals."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from spider_sense.config import Settings
from spider_sense.extraction.stores.store import check_names

__all__ = ["ExtractionSettings"]


def _checked(name: str) -> str:
    check_names([name])
    return name


Name = Annotated[str, AfterValidator(_checked)]
"""Of a principal."""


class ExtractionSettings(Settings):
    """How extraction is watched for while a model is served. Paths are relative to the working directory."""

    detector: Path
    """Folder that ``spider-sense extraction calibrate`` wrote."""
    key: Path
    """File of random bytes; the one that the detector was fitted with."""
    store: Annotated[str, Field(min_length=1)]
    """File of SQLite's, or ``redis://``, ``rediss://`` or ``unix://`` where several servers share it."""
    retention_days: PositiveFloat | None = 90.0
    """After so long without a request a principal is erased; None for never."""
    linked: tuple[tuple[Name, ...], ...] = ()
    """Sets of principals that are one: the same owner's keys, or one account over several channels."""
    tenants: dict[Name, Annotated[str, Field(max_length=24, pattern=r"^[ -~]*$")]] = Field(default_factory=dict)
    """Declared type of principals, which chooses the thresholds; of those who are not named it is empty."""
    queue: PositiveInt = 4096
    """Requests that wait at most; further ones are dropped, and counted."""
    batch: PositiveInt = 256
    """Requests that are committed together."""
    flush_seconds: Annotated[float, Field(gt=0, le=1)] = 0.2
    """That a request waits at most for others to be committed with it."""
    refresh_seconds: PositiveFloat = 5.0
    """Between two looks at what other servers, reviews and operators have written."""
