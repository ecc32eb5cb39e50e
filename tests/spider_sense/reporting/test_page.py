import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from spider_sense.calibration import Calibration
from spider_sense.reporting import Report, render
from spider_sense.reporting.charts import by_layer
from spider_sense.reporting.limits import limits, summary_line
from spider_sense.reporting.report import (
    Conversation,
    DetectorFacts,
    GuardFacts,
    Rate,
    SweepPoint,
    System,
    Token,
    Track,
)

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title>", "\u202e&lt;b&gt;")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects elements and text, and fails on a tag that does not close."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def facts(thresholds: Calibration, **changes: Any) -> DetectorFacts:
    systems = [
        System(
            name=name, auroc=0.9, log_auroc=0.4, tpr=Rate(value=tpr, low=0.1, high=0.9), roc=((0.0, 0.1), (0.02, tpr))
        )
        for name, tpr in (("guard", 0.5), ("tfidf", 0.25), ("length", 0.01))
    ]
    points = [
        SweepPoint(family="logistic", sites=sites, tpr=0.3, auroc=0.8, chosen=chosen)
        for sites, chosen in ((("resid.1",), False), (("resid.2",), True), (("resid.1", "resid.2"), False))
    ]
    values: dict[str, Any] = {
        "name": "misuse",
        "family": "logistic",
        "sites": ("resid.2",),
        "aggregator": "mean",
        "calibration": thresholds,
        "systems": systems,
        "n": 200,
        "positives": 80,
        "gain": Rate(value=0.2, low=0.1, high=0.3),
        "beats_tfidf": True,
        "warning": None,
        "candidates": points,
    }
    return DetectorFacts(**(values | changes))


def conversation(texts: tuple[str, ...], readouts: tuple[float | None, ...] = (0.5, 1.5, 2.5)) -> Conversation:
    tokens = [
        Token(text=text, position=index, response=False, logit=0.2, contribution=-0.1, readout=None)
        for index, text in enumerate(texts)
    ]
    tokens += [
        Token(text=f" r{index}", position=len(texts) + index, response=True, logit=1.0, contribution=2.0, readout=value)
        for index, value in enumerate(readouts)
    ]
    peak = max((value for value in readouts if value is not None), default=math.nan)
    tracks = [
        Track(detector=name, meaning="M", zone="breach", peak=peak, suspect=1.0, breach=2.0, tokens=tuple(tokens))
        for name in ("misuse", "other")
    ]
    fields: dict[str, Any] = {"label": "harmful", "skipped": 2, "missing": 0, "action": "stop", "difference": 2e-7}
    return Conversation(name=texts[0], tracks=tuple(tracks), **fields)


def report(detectors: tuple[DetectorFacts, ...], *conversations: Conversation) -> Report:
    guard = GuardFacts(
        model="org/<b>model</b>",
        architecture="A",
        layers=2,
        digest="abc123",
        certified=("float32",),
        signed=False,
        sources=("one",),
        test_sources=("two",),
    )
    return Report(
        created="2026-01-01 00:00 UTC",
        guard=guard,
        detectors=detectors,
        serving="float32",
        origin="Made.",
        conversations=conversations,
        summaries=tuple(map(summary_line, detectors)),
        limits=limits(guard, detectors, "float32"),
    )


@pytest.fixture
def thresholds(guards: Any) -> Calibration:
    """Thresholds for two lengths."""
    made: Calibration = guards.calibration(1.0, 2.0)
    return made


@pytest.fixture
def page(thresholds: Calibration) -> str:
    """A page with two detectors and a hostile prompt."""
    both = (facts(thresholds), facts(thresholds, name="other"))
    return render(report(both, conversation(HOSTILE)))


def test_hostile_prompts_stay_text(page: str) -> None:
    reader = read(page)
    assert not {tag for tag, _ in reader.elements} & {"script", "img", "link", "iframe", "object"}
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    for text in HOSTILE[:3]:
        assert text in reader.text
    assert "\u202e" not in page
    assert "org/<b>model</b>" in reader.text


def test_a_hostile_prompt_stays_inside_its_tooltip(page: str) -> None:
    titles = [attributes["title"] or "" for tag, attributes in read(page).elements if "title" in attributes]
    assert any(title.startswith(HOSTILE[1]) for title in titles)


def test_hostile_names_of_a_manifest_stay_text(thresholds: Calibration) -> None:
    name = '"><script>'
    system = System(
        name=name, auroc=None, log_auroc=None, tpr=Rate(value=None, low=None, high=None), roc=((0.01, 0.5),)
    )
    reader = read(render(report((facts(thresholds, systems=(system,), warning=name, family=name),))))
    assert "script" not in {tag for tag, _ in reader.elements}


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.findall(r"(?:https?:)?//|url\(|@import", page.replace("<!DOCTYPE html>", ""))
    assert not [name for _, attributes in read(page).elements for name in ("src", "href") if name in attributes]
    assert "default-src 'none'" in page


def test_breaches_are_underlined_and_explained(page: str) -> None:
    spans = [attributes for tag, attributes in read(page).elements if tag == "span" and "title" in attributes]
    by_text = {str(attributes["title"]).partition(" at position")[0]: attributes for attributes in spans}
    assert "breached" in str(by_text["r2"]["class"])
    assert "suspected" in str(by_text["r1"]["class"])
    assert str(by_text["r0"]["class"]).split() == ["t", "for"]
    assert "against" in str(by_text[HOSTILE[0]]["class"])
    assert "running readout 2.500" in str(by_text["r2"]["title"])
    assert "token logit +1.000" in str(by_text["r2"]["title"])


def test_every_part_of_the_page_is_there(page: str) -> None:
    text = read(page).text
    for words in (
        "with 1% of benign prompts flagged it catches 50%",
        "TF-IDF catches 25%",
        "abc123",
        "stop",
        "Detector other: breach",
        "Gain over TF-IDF at 1% FPR: +20.0 points (+10.0 to +30.0)",
        "Needed",
        "logistic over 2 sites",
        "at most 2.0e-07",
        "What these numbers do not show",
    ):
        assert words in text
    assert page.count("<svg") == 2 + 2 * 2


def test_a_report_survives_json_and_renders_the_same(thresholds: Calibration) -> None:
    made = report((facts(thresholds), facts(thresholds)), conversation(("one",)))
    assert render(Report.model_validate_json(made.model_dump_json())) == render(made)


def test_a_guard_that_keeps_nothing_is_shown_with_what_is_missing(thresholds: Calibration) -> None:
    empty = facts(thresholds, systems=(), candidates=(), n=0, positives=0, gain=None, beats_tfidf=None)
    text = read(render(report((empty, empty), conversation(("one",), (None, None))))).text
    assert "holds no test results" in text
    assert "holds no sweep" in text
    assert "not a number anywhere" in text


def test_the_limits_name_what_is_weak(thresholds: Calibration) -> None:
    made = report((facts(thresholds, beats_tfidf=False),))
    text = " ".join(made.limits)
    assert "does not beat TF-IDF" in text
    assert "as few as 100 benign conversations" in text
    assert "needs 299" in text
    assert "up to 128 tokens" in text
    assert "one benign prompt is 0.8%" in text
    assert "does not beat" not in " ".join(report((facts(thresholds),)).limits)
    assert "bfloat16" in limits(made.guard, made.detectors, "bfloat16")[0]


def test_families_of_one_layer_are_no_line(thresholds: Calibration) -> None:
    points = facts(thresholds).candidates
    assert [layer for layer, _ in by_layer(points)["logistic"]] == [1, 2]
    assert by_layer(points[1:]) == {}
