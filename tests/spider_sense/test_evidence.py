import json

import numpy as np
import pytest

from spider_sense.evidence import evidence, summary
from spider_sense.metrics import tpr_at_fpr
from spider_sense.resampling import tpr_interval
from tests.labelled_rows import gaussian


def alone(rows: int) -> list[str]:
    return [str(row) for row in range(rows)]


def test_summary_is_json_and_none_where_a_class_is_missing() -> None:
    scores, labels = gaussian(3)
    full = json.loads(json.dumps(summary(scores.astype(np.float32), labels, alone(800)), allow_nan=False))
    assert (full["n"], full["positives"]) == (800, 400)
    assert full["auroc"] == pytest.approx(0.983, abs=0.01)
    for key, fpr in (("tpr_at_1pct_fpr", 0.01), ("tpr_at_0_1pct_fpr", 0.001)):
        assert full[key]["value"] == tpr_at_fpr(scores.astype(np.float32), labels, fpr).tpr.value
        assert full[key]["low"] < full[key]["value"] < full[key]["high"]
    nothing = {"value": None, "low": None, "high": None}
    assert summary(np.arange(3.0), np.ones(3, dtype=bool), alone(3)) == {
        "n": 3,
        "positives": 3,
        "auroc": None,
        "log_auroc": None,
        "tpr_at_1pct_fpr": nothing,
        "tpr_at_0_1pct_fpr": nothing,
    }


def test_the_interval_holds_that_the_threshold_was_chosen_on_the_same_negatives() -> None:
    scores, labels = gaussian(3)
    caught, exact = summary(scores, labels, alone(800))["tpr_at_1pct_fpr"], tpr_at_fpr(scores, labels, 0.01).tpr
    assert caught["high"] - caught["low"] > 1.5 * (exact.high - exact.low)


def test_rows_of_a_group_count_together_beside_every_control() -> None:
    scores, labels = gaussian(2, n=100)
    rows = np.tile(scores, 4), np.tile(labels, 4)
    groups = alone(200) * 4
    found = evidence(*rows, {"tfidf": rows[0]}, groups)
    expected = tpr_interval(*rows, groups, 0.01)
    assert expected is not None
    for system in ("guard", "tfidf"):
        assert found[system]["tpr_at_1pct_fpr"]["low"] == expected.low
        assert found[system]["tpr_at_1pct_fpr"]["high"] == expected.high
    assert found["beats_tfidf"] is False
