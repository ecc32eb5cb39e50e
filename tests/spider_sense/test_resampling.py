from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from spider_sense.errors import ConfigError
from spider_sense.metrics import auroc, tpr_at_fpr
from spider_sense.rates import Interval, clopper_pearson
from spider_sense.resampling import auroc_interval, paired_bootstrap_tpr_difference, tpr_interval
from tests.labelled_rows import gaussian

ALONE = [str(row) for row in range(800)]


def test_paired_bootstrap_sees_the_better_system_and_its_own_twin() -> None:
    strong, labels = gaussian(3)
    weak, _ = gaussian(1, seed=1)
    difference = paired_bootstrap_tpr_difference(strong, weak, labels, ALONE, 0.05, resamples=200)
    assert difference is not None
    assert 0.3 < difference.low < difference.mean < difference.high < 0.9
    twin = paired_bootstrap_tpr_difference(strong, strong, labels, ALONE, 0.05, resamples=50)
    assert twin is not None
    assert (twin.low, twin.mean, twin.high) == (0, 0, 0)


def test_paired_bootstrap_is_narrower_than_an_unpaired_one() -> None:
    scores, labels = gaussian(2)
    rival = scores + np.random.default_rng(2).normal(0, 0.05, scores.size)
    elsewhere, _ = gaussian(2, seed=3)
    paired = paired_bootstrap_tpr_difference(scores, rival, labels, ALONE, 0.05, resamples=200)
    unpaired = paired_bootstrap_tpr_difference(scores, elsewhere, labels, ALONE, 0.05, resamples=200)
    assert paired is not None
    assert unpaired is not None
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_copies_of_a_row_are_no_independent_evidence_of_a_gain() -> None:
    one, labels = gaussian(1, n=12)
    other, _ = gaussian(1, n=12, seed=1)
    alone = paired_bootstrap_tpr_difference(one, other, labels, ALONE[:24], 0.05, resamples=200)
    copies = np.tile(one, 20), np.tile(other, 20), np.tile(labels, 20)
    together = paired_bootstrap_tpr_difference(*copies, ALONE[:24] * 20, 0.05, resamples=200)
    apart = paired_bootstrap_tpr_difference(*copies, ALONE[:480], 0.05, resamples=200)
    assert alone == together
    assert apart is not None
    assert together is not None
    assert apart.high - apart.low < (together.high - together.low) / 2


def test_paired_bootstrap_gives_the_mean_and_the_95_percent_interval() -> None:
    scores, labels = gaussian(1)
    rival, _ = gaussian(1, seed=1)
    one, two = (
        paired_bootstrap_tpr_difference(scores, rival, labels, ALONE, 0.05, resamples=count) for count in (1, 2)
    )
    assert one is not None
    assert two is not None
    first, second = one.mean, 2 * two.mean - one.mean
    step = abs(second - first)
    assert step > 0
    assert [two.low, two.high] == pytest.approx([min(first, second) + 0.025 * step, max(first, second) - 0.025 * step])


def test_paired_bootstrap_repeats_with_its_seed_and_needs_both_classes() -> None:
    scores, labels = gaussian(1)
    rival, _ = gaussian(1, seed=1)

    def run(seed: int) -> Any:
        return paired_bootstrap_tpr_difference(scores, rival, labels, ALONE, 0.05, resamples=20, seed=seed)

    assert run(7) == run(7) != run(8)
    assert paired_bootstrap_tpr_difference(scores, rival, np.ones_like(labels), ALONE, 0.05) is None
    with pytest.raises(ConfigError, match="resamples=0"):
        paired_bootstrap_tpr_difference(scores, rival, labels, ALONE, 0.05, resamples=0)


def test_the_interval_of_the_auroc_holds_it_and_narrows_with_rows() -> None:
    wide, narrow = gaussian(1.0, n=40), gaussian(1.0, n=400)
    names = [[str(row) for row in range(len(rows[0]))] for rows in (wide, narrow)]
    spans = []
    for (scores, labels), groups in zip((wide, narrow), names, strict=True):
        found, area = auroc_interval(scores, labels, groups, resamples=200), auroc(scores, labels)
        assert found is not None
        assert area is not None
        assert found.low < area < found.high
        spans.append(found.high - found.low)
    assert spans[1] < spans[0] / 2


def test_rows_of_a_group_are_no_independent_evidence() -> None:
    scores, labels = gaussian(1.0, n=20)
    alone = auroc_interval(scores, labels, [str(row) for row in range(40)], resamples=200)
    repeated = auroc_interval(
        np.tile(scores, 10), np.tile(labels, 10), [str(row) for row in range(40)] * 10, resamples=200
    )
    assert alone == repeated


def test_the_interval_of_the_auroc_needs_both_classes() -> None:
    assert auroc_interval(np.array([1.0, 2.0]), np.array([True, True]), ["a", "b"]) is None


@pytest.mark.parametrize(("caught", "wider"), [(5, True), (10, False)])
def test_rows_of_one_context_are_no_independent_evidence(caught: int, wider: bool) -> None:
    scores = np.repeat([1.0] * caught + [-1.0] * (10 - caught) + [0.0], [8] * 10 + [100])
    labels, groups = np.arange(180) < 80, [f"context {row // 8}" for row in range(180)]
    found = tpr_interval(scores, labels, groups, 0.01, resamples=200)
    assert found is not None
    exact = clopper_pearson(8 * caught, 80)
    assert tpr_at_fpr(scores, labels, 0.01).tpr.value == caught / 10
    assert (found.low < exact.low - 0.05) is wider
    # Where all are caught no resample differs, and the exact interval stands.
    assert wider or found.low == exact.low


def simulated(draw: np.random.Generator, contexts: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return scores, labels and groups: of each context a negative and four positives, which share half a standard
    deviation; positives lie 2.7 standard deviations above."""
    shared, alone = 0.5, np.sqrt(0.75)
    context = draw.normal(0, shared, contexts)
    rows = np.concatenate([context, np.repeat(context, 4) + 2.7]) + draw.normal(0, alone, 5 * contexts)
    groups = [str(group) for group in [*range(contexts), *np.repeat(np.arange(contexts), 4)]]
    return rows, np.arange(5 * contexts) >= contexts, groups


@pytest.mark.parametrize(("contexts", "least"), [(82, 0.55), (300, 0.85)])
def test_the_interval_of_a_rate_holds_the_true_one(contexts: int, least: float) -> None:
    draw, held = np.random.default_rng(0), []
    true = 1 - NormalDist().cdf(NormalDist().inv_cdf(0.99) - 2.7)
    for _ in range(60):
        found = tpr_interval(*simulated(draw, contexts), 0.01, resamples=100)
        assert found is not None
        held.append(found.low <= true <= found.high)
    assert np.mean(held) >= least


def test_nothing_is_caught_where_no_threshold_keeps_to_the_rate() -> None:
    scores, labels = np.array([np.inf, np.inf, np.nan, np.inf]), np.array([True, True, False, False])
    found = tpr_interval(scores, labels, ["a", "b", "c", "d"], 0.01, resamples=50)
    assert found == Interval(0.0, clopper_pearson(0, 2).high)
    assert tpr_interval(scores, ~labels & False, ["a", "b", "c", "d"], 0.01) is None
