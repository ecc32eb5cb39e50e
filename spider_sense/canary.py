"""Canaries: benign prompts that a guard carries with their scores, by which an engine shows that it scores alike.

Shape letters: N prompts, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, PositiveFloat

from spider_sense.folders import Record

__all__ = ["Canaries", "Canary", "Drift"]


class Canary(Record):
    """One prompt."""

    tokens: tuple[int, ...] = Field(min_length=1)
    """As the chat template renders it."""
    scores: tuple[FiniteFloat | None, ...]
    """What each detector made of it where the guard was calibrated: the maximum over time, in logits; None of one that
    reads responses alone."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an engine's scores lie from those of the guard, at the place where it matters most."""

    detector: str
    prompt: int
    """Place among the canaries, from 0."""
    expected: float
    found: float
    """NaN if the engine did not say."""
    difference: float
    """Over max(1, |expected|)."""
    band: float
    """The largest difference to accept."""

    @property
    def accepted(self) -> bool:
        """Whether all canaries lie within their bands."""
        return self.difference <= self.band

    def __str__(self) -> str:
        return (
            f"{self.detector} scores canary {self.prompt} {self.found:.6g}, the guard says {self.expected:.6g}: "
            f"a difference of {self.difference:.2g}, where {self.band:.2g} is accepted"
        )


class Canaries(Record):
    """All of them."""

    prompts: tuple[Canary, ...] = Field(min_length=1)
    bands: tuple[PositiveFloat, ...]
    """For each detector the largest difference to accept, over max(1, |score|)."""

    def fit(self, detectors: int) -> bool:
        """Return whether there is a score of every detector, and a band."""
        return {len(self.bands), *(len(canary.scores) for canary in self.prompts)} == {detectors}

    def drift(self, found_NH: npt.NDArray[np.floating[Any]], detectors: Sequence[str]) -> Drift:
        """Compare with scores found elsewhere.

        Args:
            found_NH: NaN where there is none, and -inf where a detector has read nothing.
            detectors: H names.

        Returns:
            The difference that is largest beside its band; one that is not a number is larger than any other.
        """
        expected_NH = np.array(
            [[-np.inf if score is None else score for score in canary.scores] for canary in self.prompts]
        )
        with np.errstate(invalid="ignore"):
            difference_NH = np.abs(found_NH - expected_NH) / np.maximum(1.0, np.abs(expected_NH))
        difference_NH[found_NH == expected_NH] = 0.0
        # The largest for argmax is the first NaN, if there is one.
        prompt, head = divmod(int(np.argmax(difference_NH / self.bands)), len(detectors))
        return Drift(
            detector=detectors[head],
            prompt=prompt,
            expected=float(expected_NH[prompt, head]),
            found=float(found_NH[prompt, head]),
            difference=float(difference_NH[prompt, head]),
            band=self.bands[head],
        )
