"""What is refused of a log before a model reads it."""

from pathlib import Path

import numpy as np
import pytest

from spider_sense.cli.extraction_tables import warn_of_limits
from spider_sense.errors import DataError, MissingExtraError
from spider_sense.extraction import Key
from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.checks import check_fit, check_installed, check_widths
from spider_sense.extraction.fitting import calibrate, events_of, fit
from spider_sense.extraction.rows import Row
from spider_sense.extraction.simulator.noise import noise_rows
from spider_sense.types import Site

KEY, WIDTH = Key(b"sixteen bytes at least"), 80
CAMPAIGN = noise_rows("bb", 20, 16, WIDTH, "mining")


@pytest.fixture(scope="module")
def fitted() -> Artifact:
    return fit(noise_rows("a", 40, 16, WIDTH), CAMPAIGN, KEY, Site(1, "resid"), width=WIDTH)


def _texts(rows: list[Row]) -> list[Row]:
    return [row.model_copy(update={"hidden": None, "text": "Hello"}) for row in rows]


@pytest.mark.parametrize(
    ("people", "requests", "says"),
    [
        (39, 16, "39 of 39 honest principals sent 16 requests or more; a fit needs 40"),
        (60, 15, "0 of 60 honest principals sent 16"),
    ],
)
def test_the_minima_of_a_fit(people: int, requests: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_fit(_texts(noise_rows("a", people, requests, 16)), _texts(CAMPAIGN), reads=True)


def test_a_fit_at_its_minima_is_one(fitted: Artifact) -> None:
    assert fitted.population.principals == 40
    assert min(fitted.population.levels) == 16


def test_a_fit_needs_families_and_activations() -> None:
    honest = noise_rows("a", 40, 16, WIDTH)
    with pytest.raises(DataError, match=r"8 families: .* at most 7"):
        check_fit(honest, [row for place in range(8) for row in noise_rows("b", 1, 1, WIDTH, f"f{place}")], reads=False)
    sketched = Row(principal="x", time=0, sketch=(0.0,) * 64)
    for rows, reads in ((_texts(honest[:1]), False), ([sketched], True)):
        with pytest.raises(DataError, match="1 of 961 requests have no hidden state"):
            check_fit([*honest, *rows], CAMPAIGN, reads=reads)


def test_hidden_states_of_two_widths_are_not_fitted_on() -> None:
    honest = noise_rows("a", 40, 16, WIDTH)
    with pytest.raises(DataError, match="hidden states have 63 and 80 numbers"):
        check_fit(honest, noise_rows("bb", 1, 16, 63, "mining"), reads=False)
    with pytest.raises(DataError, match=r"63 numbers; .* at least 64 wide"):
        check_fit(noise_rows("a", 40, 16, 63), noise_rows("bb", 1, 16, 63, "mining"), reads=False)


def test_thresholds_are_not_set_on_those_who_were_fitted_on(fitted: Artifact, tmp_path: Path) -> None:
    again = fitted.save_pretrained(tmp_path / "guard")
    seen, other = noise_rows("a", 2, 16, WIDTH), noise_rows("ccc", 20, 16, WIDTH)
    with pytest.raises(DataError, match=r"2 of 22 principals were fitted on, 'a 0' among them.*leave them out"):
        calibrate(again, [*other, *seen], KEY)
    assert calibrate(again, other, KEY).calibration is not None
    written = b"".join(path.read_bytes() for path in (tmp_path / "guard").iterdir())
    assert b"a 0" not in written


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"hidden": (1.0,) * 79}, "79 hidden numbers, expected 80"),
        ({"sketch": (1.0,) * 63}, "a sketch of 63 numbers, expected 64"),
        ({"sketch": (1.0,) * 64, "probes": (1.0,) * 8}, "8 probes, expected 2"),
        ({"sketch": (1.0,) * 64, "probes": (1.0,)}, "1 probes, expected 2"),
        ({"sketch": (1.0,) * 64}, "0 probes, expected 2"),
    ],
)
def test_activations_of_another_length(fitted: Artifact, row: dict[str, tuple[float, ...]], says: str) -> None:
    rows = [*CAMPAIGN[:2], Row.model_validate({"principal": "ann", "time": 1} | row)]
    with pytest.raises(DataError, match=f"a request of 'ann' has {says}"):
        check_widths(rows, WIDTH, heads=2)
    with pytest.raises(DataError, match=f"a request of 'ann' has {says}"):
        events_of(fitted, rows, KEY)


def test_a_level_is_not_certified_where_work_has_no_name(fitted: Artifact, tmp_path: Path) -> None:
    honest = noise_rows("ccc", 300, 16, WIDTH)
    named = [row.model_copy(update={"family": f"kind {int(row.principal.split()[1]) % 9}"}) for row in honest]
    for rows, unnamed in ((named, 0), (honest, 300), ([*named[:-16], *honest[-16:]], 1)):
        found = calibrate(fitted, rows, KEY).save_pretrained(tmp_path / "guard").calibration
        assert found is not None
        assert found.unnamed == unnamed
        assert found.certified("own", "")
        assert found.enough("level", "")
        assert found.certified("level", "") == (not unnamed)


def test_groups_are_not_certified_where_work_has_no_name(
    fitted: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        row.model_copy(update={"links": {"declared": f"pair {int(row.principal.split()[1]) // 2}"}})
        for row in noise_rows("ccc", 60, 16, WIDTH)
    ]
    found = calibrate(fitted, pairs, KEY).save_pretrained(tmp_path / "guard").calibration
    assert found is not None
    assert found.unnamed_groups == 30
    warn_of_limits(found, fitted.population)
    assert (
        "group is uncertified: 30 of 30 honest linked groups have members without `family`" in capsys.readouterr().err
    )


def test_packages_are_missed_before_a_log_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spider_sense.extraction.checks.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn is not installed; run, in the checkout: .*\[train\]"):
        check_fit([], [], reads=False)
    with pytest.raises(MissingExtraError, match=r"matplotlib is not installed; run, in the checkout: .*\[extraction\]"):
        check_installed("extraction", "matplotlib")


def test_numbers_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="finite number"):
        Row(principal="ann", time=1, hidden=(1.0, float(np.nan)))
