"""The probes for campaigns."""

import numpy as np
import pytest

from spider_sense.errors import DataError
from spider_sense.extraction.probes import ANY, crossed, fit_probes, once_each

WIDTH, KINDS, ROWS = 40, 6, 60


def _benign(seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Every kind of work has a mean of its own."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 2, (KINDS, WIDTH))
    rows = centres.repeat(ROWS, axis=0) + rng.normal(0, 1, (KINDS * ROWS, WIDTH))
    return rows.astype(np.float32), [f"work {kind}" for kind in np.arange(KINDS).repeat(ROWS)]


def _campaigns(count: int = 3, common: float = 6.0) -> dict[str, np.ndarray]:
    """All families share the first coordinate; each has one of its own."""
    found = {}
    for place in range(count):
        rows = np.random.default_rng([7, place]).normal(0, 1, (50, WIDTH))
        rows[:, 0] += common
        rows[:, 1 + place] += 6
        found[f"campaign {place}"] = rows.astype(np.float32)
    return found


def test_each_family_has_a_probe_and_all_have_one() -> None:
    benign, _ = _benign()
    probes = fit_probes(benign, np.ones(len(benign)), _campaigns())
    assert list(probes) == [ANY, "campaign 0", "campaign 1", "campaign 2"]
    new = _campaigns(4)["campaign 3"]
    for name in (ANY, "campaign 1"):
        weight, bias = probes[name]
        assert (benign @ weight + bias > 0).mean() < 0.05
    weight, bias = probes[ANY]
    assert (new @ weight + bias > 0).mean() > 0.9
    assert fit_probes(benign, np.ones(len(benign)), {}) == {}
    with pytest.raises(DataError, match="8 families"):
        fit_probes(benign, np.ones(len(benign)), {str(place): benign for place in range(8)})


def test_a_request_counts_as_often_as_it_is_repeated() -> None:
    benign, _ = _benign()
    once, twice = np.ones(len(benign)), np.ones(len(benign))
    twice[:ROWS] = 2
    repeated = np.concatenate([benign, benign[:ROWS]])
    weight, bias = fit_probes(repeated, np.ones(len(repeated)), _campaigns())[ANY]
    expected, its = fit_probes(benign, twice, _campaigns())[ANY]
    np.testing.assert_allclose(weight, expected, atol=0.02)
    assert bias == pytest.approx(its, abs=0.1)
    other, _ = fit_probes(benign, once, _campaigns())[ANY]
    assert np.abs(other - expected).max() > np.abs(weight - expected).max()


def test_principals_weigh_the_same() -> None:
    assert once_each(["a", "b", "a", "a"]).tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])


def test_crossed_logits_come_from_other_work() -> None:
    """A kind of work that resembles a campaign looks tame to a probe that was fitted on it, and not to another one."""
    benign, work = _benign()
    benign[-ROWS:, 0] += 4
    weight, bias = fit_probes(benign, np.ones(len(benign)), _campaigns())[ANY]
    logits = crossed(benign, np.ones(len(benign)), work, _campaigns())
    assert np.isfinite(logits).all()
    assert logits[-ROWS:].mean() > (benign[-ROWS:] @ weight + bias).mean() + 1


def test_one_kind_of_work_is_read_by_its_own_probe() -> None:
    benign, _ = _benign()
    weight, bias = fit_probes(benign, np.ones(len(benign)), _campaigns())[ANY]
    alone = crossed(benign, np.ones(len(benign)), ["work"] * len(benign), _campaigns())
    np.testing.assert_allclose(alone, benign @ weight + bias, atol=1e-3)
