"""Canaries in an engine: whose scores are taken, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spider_sense.canary import Canaries, Canary, Drift
from spider_sense.errors import MismatchError
from spider_sense.guard import Manifest
from spider_sense.models import LoadedModel
from spider_sense.serving.canary import CanaryWatch, check_drift, report


def said(**found: tuple[float, int]) -> Any:
    """Return the output of a step with the findings of some requests: score, tokens so far."""
    findings = SimpleNamespace(
        unrecorded=0,
        ids=tuple(found),
        peak_BH=np.array([[peak] for peak, _ in found.values()], np.float32),
        coverage_B3=np.array([[tokens, 0, 0] for _, tokens in found.values()]),
    )
    return SimpleNamespace(spider_sense=findings)


def test_what_the_log_did_not_take_meanwhile_is_known(watch: CanaryWatch) -> None:
    output = said(**{next(iter(watch.requests)): (0.5, 2)})
    output.spider_sense.unrecorded = 2
    watched(watch, output, output, SimpleNamespace())
    assert watch.unrecorded == 4


def watched(watch: CanaryWatch, *outputs: Any) -> Drift:
    """Return the drift after some steps, each of which has gone on as ever."""
    seen: list[Any] = []
    for output in outputs:
        watch.update(lambda *step: seen.append(step), None, "step", output)
    assert seen == [("step", output) for output in outputs]
    return watch.drift(("misuse",))


@pytest.fixture
def watch() -> CanaryWatch:
    prompts = (Canary(tokens=(1, 2), scores=(0.5,)), Canary(tokens=(3,), scores=(-0.5,)))
    return CanaryWatch(Canaries(prompts=prompts, bands=(0.01,)))


@pytest.fixture
def manifest(guards: Any, tiny_loaded: LoadedModel) -> Manifest:
    made: Manifest = guards.guard(tiny_loaded, (guards.probe("misuse", "mean", "resid.0"),)).manifest
    return made


def test_the_score_at_the_end_of_the_prompt_counts(watch: CanaryWatch) -> None:
    first, second = watch.requests
    drift = watched(
        watch,
        said(**{first: (-np.inf, 1)}),
        said(**{first: (0.5, 2), second: (-0.504, 1)}),
        said(**{first: (9.0, 3), second: (9.0, 2)}),
        SimpleNamespace(),
    )
    assert (drift.prompt, drift.accepted) == (1, True)
    assert drift.difference == pytest.approx(0.004, rel=1e-5)


def test_a_tap_that_is_dead_while_tokens_are_generated_is_found(watch: CanaryWatch, manifest: Manifest) -> None:
    first, second = watch.requests
    ends = said(**{first: (0.5, 2), second: (-0.5, 1)})
    drift = watched(watch, ends, said(**{first: (0.5, 3), second: (np.nan, 2)}), said(**{second: (np.nan, 3)}))
    with pytest.raises(MismatchError, match="misuse scores canary 1 nan"):
        check_drift(drift, manifest, allow_uncertified=True)


def test_a_canary_that_nothing_is_said_of_is_refused(watch: CanaryWatch, manifest: Manifest) -> None:
    drift = watched(watch, said(**{next(iter(watch.requests)): (0.5, 2)}))
    for allow_uncertified in (False, True):
        with pytest.raises(MismatchError, match=r"misuse scores canary 1 nan, the guard says -0\.5"):
            check_drift(drift, manifest, allow_uncertified)


def test_bands_bind_in_the_configuration_that_they_were_measured_in(watch: CanaryWatch, manifest: Manifest) -> None:
    first, second = watch.requests
    drift = watched(watch, said(**{first: (0.5, 2), second: (-0.6, 1)}))
    with pytest.raises(MismatchError, match=r"a difference of 0\.1, where 0\.01 is accepted.*float32.*calibrate"):
        check_drift(drift, manifest, allow_uncertified=False)
    check_drift(drift, manifest, allow_uncertified=True)
    told = report(drift)
    assert told is not None
    assert (told["detector"], told["prompt"], told["accepted"]) == ("misuse", 1, False)
    assert report(None) is None
