"""The extraction guard's folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from spider_sense.errors import GuardError, MismatchError
from spider_sense.extraction import Key
from spider_sense.extraction.artifact import MANIFEST, TENSORS, Artifact
from spider_sense.extraction.layout import SKETCH, VERSION
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.sketch import Sketch
from spider_sense.extraction.thresholds import Calibration
from spider_sense.extraction.tiers import TieredDetector
from spider_sense.types import Site


@pytest.fixture
def artifact(detector: TieredDetector, tiny_streams: Any) -> Artifact:
    names, rng = tiny_streams.PROBE_NAMES, np.random.default_rng(0)
    shapes: tuple[Any, ...] = (576, (576, SKETCH), (576, len(names)), len(names))
    mean, projection, weights, biases = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return Artifact(
        sketch=Sketch(mean, projection, weights, biases, names),
        population=detector.population,
        site=Site.parse("resid.18"),
        key_digest=tiny_streams.KEY.digest,
        lists=KnownLists.build({"sums": ["How many legs do twelve geese and seven sheep have in all?"]}),
        calibration=detector.calibration,
    )


def test_what_is_read_back_decides_alike(
    artifact: Artifact, detector: TieredDetector, tiny_streams: Any, tmp_path: Path
) -> None:
    again = artifact.save_pretrained(tmp_path / "guard")
    assert again.digest == artifact.digest
    assert again.lists is not None
    assert again.lists.find("How many legs do twelve geese and seven sheep have in all?") == 0
    streams = [tiny_streams.stream("a", 7, 128, attack_from=40), tiny_streams.stream("b", 8, 20)]
    one, other = again.detector(tiny_streams.KEY).replay(streams), detector.replay(streams)
    assert one.states.tobytes() == other.states.tobytes()
    assert_array_equal(again.population.recent.scale, detector.population.recent.scale)
    assert again.population.recent.spread == detector.population.recent.spread
    assert again.calibration is not None
    assert detector.calibration is not None
    assert_array_equal(again.calibration.lasting["own"][""], detector.calibration.lasting["own"][""])
    for tier in ("own", "level", "group"):
        assert again.detector(tiny_streams.KEY).threshold(tier, "") == detector.threshold(tier, "")
    assert not list((tmp_path / "guard").glob("*.pkl"))


def test_what_limits_nobody_limits_nobody_when_it_is_read_back(artifact: Artifact, tmp_path: Path) -> None:
    none = np.full(300, -np.inf)
    short = artifact.calibrated(Calibration.fit(none, none, [""] * 300, np.full(300, 16)))
    again = short.save_pretrained(tmp_path / "guard")
    assert again.calibration is not None
    assert again.calibration.threshold("own") == again.calibration.threshold("level") == np.inf


def test_other_thresholds_have_another_digest(artifact: Artifact) -> None:
    assert replace(artifact, calibration=None).digest != artifact.digest


def test_another_key_is_refused_with_both_names(artifact: Artifact, tiny_streams: Any) -> None:
    with pytest.raises(MismatchError, match=tiny_streams.KEY.digest):
        artifact.detector(Key(b"another sixteen bytes"))


def test_a_guard_without_a_model_fits_no_model(artifact: Artifact, tiny_loaded: Any) -> None:
    from spider_sense.fingerprint import fingerprint

    found = fingerprint(tiny_loaded)
    with pytest.raises(MismatchError, match="fitted on activations without a model"):
        artifact.check_model(found)
    with pytest.raises(MismatchError, match="weight_digest"):
        replace(artifact, base=found.model_copy(update={"weight_digest": "0"})).check_model(found)
    replace(artifact, base=found).check_model(found)


def test_damage_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "guard"
    artifact.save_pretrained(folder)
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest.replace('"resid.18"', '"nowhere"'))
    with pytest.raises(GuardError, match="nowhere"):
        Artifact.from_pretrained(folder)
    (folder / MANIFEST).write_text(manifest.replace(f'"schema_version": {VERSION}', '"schema_version": 99'))
    with pytest.raises(GuardError, match="99"):
        Artifact.from_pretrained(folder)
    (folder / MANIFEST).write_text(manifest.replace('"width": 576', '"width": 64'))
    with pytest.raises(GuardError, match="576 numbers wide where 64"):
        Artifact.from_pretrained(folder)
    (folder / MANIFEST).write_text(manifest)
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-1])
    with pytest.raises(GuardError, match="truncated or was exchanged"):
        Artifact.from_pretrained(folder)


def test_a_folder_of_something_else_is_not_replaced(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GuardError, match="not replaced"):
        artifact.save_pretrained(tmp_path)
