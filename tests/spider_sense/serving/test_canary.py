"""Canaries in an engine: whose scores are taken, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spider_sense.canary import Canaries, Canary
from spider_sense.errors import MismatchError
from spider_sense.models import LoadedModel
from spider_sense.serving.canary import CanaryWatch, check_drift, report


def said(**peaks: float) -> Any:
    """Return the output of a step with the findings of some requests."""
    findings = SimpleNamespace(ids=tuple(peaks), peak_BH=np.array([[peak] for peak in peaks.values()], np.float32))
    return SimpleNamespace(spider_sense=findings)


@pytest.fixture
def watch() -> CanaryWatch:
    prompts = (Canary(tokens=(1, 2), scores=(0.5,)), Canary(tokens=(3,), scores=(-0.5,)))
    return CanaryWatch(Canaries(prompts=prompts, bands=(0.01,)))


def test_the_last_score_of_each_canary_counts_and_the_step_goes_on_as_ever(watch: CanaryWatch) -> None:
    first, second = watch.names
    seen = []
    for output in (said(**{first: -np.inf}), said(**{first: 0.5, second: -0.504}), SimpleNamespace()):
        watch.update(lambda *step: seen.append(step), None, "step", output)
    assert len(seen) == 3
    drift = watch.drift(("misuse",))
    assert (drift.prompt, drift.accepted) == (1, True)
    assert drift.difference == pytest.approx(0.004, rel=1e-5)


def test_a_canary_that_nothing_is_said_of_is_refused(watch: CanaryWatch, guards: Any, tiny_loaded: LoadedModel) -> None:
    watch.update(lambda *step: None, None, "step", said(**{watch.names[0]: 0.5}))
    manifest = guards.guard(tiny_loaded, (guards.probe("misuse", "mean", "resid.0"),)).manifest
    drift = watch.drift(("misuse",))
    for allow_uncertified in (False, True):
        with pytest.raises(MismatchError, match=r"misuse scores canary 1 nan, the guard says -0\.5"):
            check_drift(drift, manifest, allow_uncertified)


def test_bands_bind_in_the_configuration_that_they_were_measured_in(
    watch: CanaryWatch, guards: Any, tiny_loaded: LoadedModel
) -> None:
    watch.update(lambda *step: None, None, "step", said(**dict(zip(watch.names, (0.5, -0.6), strict=True))))
    manifest = guards.guard(tiny_loaded, (guards.probe("misuse", "mean", "resid.0"),)).manifest
    drift = watch.drift(("misuse",))
    with pytest.raises(MismatchError, match=r"a difference of 0\.1, where 0\.01 is accepted.*float32.*calibrate"):
        check_drift(drift, manifest, allow_uncertified=False)
    check_drift(drift, manifest, allow_uncertified=True)
    told = report(drift)
    assert told is not None
    assert (told["detector"], told["prompt"], told["accepted"]) == ("misuse", 1, False)
    assert report(None) is None
