"""The canaries of a guard: which difference counts, and which is too large."""

import json
from typing import Any

import numpy as np
import pytest

from spider_sense.canary import Canaries, Canary
from spider_sense.errors import GuardError
from spider_sense.guard import MANIFEST, Guard, Manifest
from spider_sense.models import LoadedModel

NAMES = ("calm", "loud")


@pytest.fixture
def canaries() -> Canaries:
    """Two prompts and two detectors; the second one scores in tens, and may differ by more."""
    prompts = (Canary(tokens=(1, 2), scores=(0.5, 40.0)), Canary(tokens=(3,), scores=(-0.5, -40.0)))
    return Canaries(prompts=prompts, bands=(0.01, 0.1))


def test_the_difference_that_counts_is_the_largest_beside_its_band(canaries: Canaries) -> None:
    same = canaries.drift(np.array([[0.5, 40.0], [-0.5, -40.0]]), NAMES)
    assert (same.difference, same.accepted) == (0.0, True)
    # 0.02 of a score below 1 counts as it is, 1.6 of a score of 40 as 0.04.
    found = canaries.drift(np.array([[0.5, 40.0], [-0.52, -41.6]]), NAMES)
    assert (found.detector, found.prompt, found.expected, found.found) == ("calm", 1, -0.5, -0.52)
    assert found.difference == pytest.approx(0.02)
    assert not found.accepted
    assert str(found) == (
        "calm scores canary 1 -0.52, the guard says -0.5: a difference of 0.02, where 0.01 is accepted"
    )
    assert canaries.drift(np.array([[0.5, 41.6], [-0.505, -40.0]]), NAMES).accepted


def test_a_score_that_is_missing_is_larger_than_any_other(canaries: Canaries) -> None:
    drift = canaries.drift(np.array([[0.5, np.nan], [9e9, -40.0]]), NAMES)
    assert (drift.detector, drift.prompt, drift.accepted) == ("loud", 0, False)


def test_a_detector_of_responses_says_nothing_of_a_prompt() -> None:
    canaries = Canaries(prompts=(Canary(tokens=(1,), scores=(0.5, None)),), bands=(0.01, 0.01))
    assert canaries.drift(np.array([[0.5, -np.inf]]), NAMES).accepted
    assert not canaries.drift(np.array([[0.5, 0.0]]), NAMES).accepted


def test_they_travel_in_the_manifest_and_in_its_digest(
    guards: Any, tiny_loaded: LoadedModel, canaries: Canaries, tmp_path: Any
) -> None:
    probes = (guards.probe("calm", "mean", "resid.0"), guards.probe("loud", "max", "resid.1"))
    bare: Guard = guards.guard(tiny_loaded, probes)
    bare.save_pretrained(tmp_path / "bare")
    # A guard of before there were any is read, named and written as it was.
    assert "canaries" not in json.loads((tmp_path / "bare" / MANIFEST).read_text())
    assert Guard.from_pretrained(tmp_path / "bare").manifest.canaries is None
    assert "canaries" not in bare.manifest.model_dump()
    manifest = bare.manifest.model_copy(update={"canaries": canaries})
    Guard(manifest, probes).save_pretrained(tmp_path / "guard")
    read = Guard.from_pretrained(tmp_path / "guard")
    assert read.manifest.canaries == canaries
    assert read.digest != Guard.from_pretrained(tmp_path / "bare").digest


@pytest.mark.parametrize(
    "wrong", [{"bands": (0.1,)}, {"prompts": (Canary(tokens=(1,), scores=(0.5,)),)}], ids=["bands", "scores"]
)
def test_every_detector_has_a_score_and_a_band(
    wrong: dict[str, Any], guards: Any, tiny_loaded: LoadedModel, canaries: Canaries, tmp_path: Any
) -> None:
    probes = (guards.probe("calm", "mean", "resid.0"), guards.probe("loud", "max", "resid.1"))
    manifest: Manifest = guards.guard(tiny_loaded, probes).manifest
    Guard(manifest.model_copy(update={"canaries": canaries.model_copy(update=wrong)}), probes).save_pretrained(
        tmp_path / "guard"
    )
    with pytest.raises(GuardError, match="a score and a band of each of the 2 detectors"):
        Guard.from_pretrained(tmp_path / "guard")
