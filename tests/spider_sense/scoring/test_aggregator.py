"""Aggregators: which settings exist, and which lanes each becomes."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from sense_kernels import PROMPT, RESPONSE, TAIL, Lane
from spider_sense.scoring.aggregator import SPAN_BITS, Aggregator, AggregatorKind, Span

ALL = PROMPT | RESPONSE


def options(kind: str) -> dict[str, Any]:
    return {"window": 4} if kind.startswith("rolling") else {}


@pytest.mark.parametrize("kind", get_args(AggregatorKind))
def test_lanes_read_every_column_of_the_head_and_no_other(kind: Any) -> None:
    aggregator = Aggregator(kind=kind, **options(kind))
    lanes = list(aggregator.lanes(head=3, column=10))
    read = {lane.value for lane in lanes} | {lane.query for lane in lanes if lane.query >= 0}
    assert read == set(range(10, 10 + aggregator.columns))
    assert {lane.head for lane in lanes} == {3}
    warm_up = 10 if kind == "ema_max" else 0
    assert {lane.window for lane in lanes} == {4 if kind.startswith("rolling") else warm_up}


@pytest.mark.parametrize("kind", ["attention", "rolling_attention"])
def test_queries_come_before_values(kind: Any) -> None:
    lanes = list(Aggregator(kind=kind, parts=3, **options(kind)).lanes(0, 5))
    assert [(lane.query, lane.value) for lane in lanes] == [(5, 8), (6, 9), (7, 10)]


def test_a_softmax_weighs_a_column_by_itself() -> None:
    (lane,) = Aggregator(kind="softmax", temperature=4.0).lanes(0, 2)
    assert lane == Lane(kind="attention", head=0, value=2, query=2, param=0.25)


def test_parameters_reach_their_lane() -> None:
    assert next(Aggregator(kind="ema_max", alpha=0.25).lanes(0, 0)).param == 0.25
    assert next(Aggregator(kind="cusum", kappa=-0.5).lanes(0, 0)).param == -0.5
    # An attention head's query is taken as it is, whatever the fields of other kinds say.
    assert next(Aggregator(kind="attention", alpha=0.25, kappa=3.0, temperature=9.0).lanes(0, 0)).param == 1.0
    assert [lane.kind for lane in Aggregator(kind="multimax", parts=3).lanes(0, 0)] == ["max"] * 3


@pytest.mark.parametrize("span", get_args(Span))
def test_spans_are_masks_of_row_codes(span: Span) -> None:
    (lane,) = Aggregator(kind="mean", span=span).lanes(0, 0)
    assert lane.span == SPAN_BITS[span] == {"all": ALL, "prompt": PROMPT, "tail": TAIL, "response": RESPONSE}[span]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "mean", "parts": 2},
        {"kind": "softmax", "parts": 2},
        {"kind": "attention", "parts": 0},
        {"kind": "ema_max", "alpha": 0.0},
        {"kind": "ema_max", "alpha": 1.5},
        {"kind": "ema_max", "alpha": float("nan")},
        {"kind": "softmax", "temperature": 0.0},
        {"kind": "softmax", "temperature": float("nan")},
        {"kind": "cusum", "kappa": float("nan")},
        {"kind": "rolling_mean_max"},
        {"kind": "rolling_mean_max", "window": -1},
        {"kind": "mean", "window": 3},
        {"kind": "median"},
        {"kind": "mean", "span": "head"},
        {"kind": "mean", "stride": 2},
        {"kind": "mean", "parts": "1"},
    ],
)
def test_a_setting_without_meaning_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Aggregator(**wrong)


@pytest.mark.parametrize("kind", get_args(AggregatorKind))
def test_json_brings_back_the_same_aggregator(kind: Any) -> None:
    aggregator = Aggregator(kind=kind, span="tail", **options(kind))
    assert Aggregator.model_validate_json(aggregator.model_dump_json()) == aggregator
