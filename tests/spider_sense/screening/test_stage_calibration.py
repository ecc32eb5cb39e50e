"""Thresholds of the stages on own traffic: scored as serving scores, counted once, and kept where there is none."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from spider_sense.calibration import calibrate
from spider_sense.errors import ConfigError, DataError, MismatchError
from spider_sense.guard import Detector
from spider_sense.models import LoadedModel
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.message import Message
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.stage_calibration import calibrate_stages
from spider_sense.screening.stage_example import written_call
from spider_sense.screening.stage_guard import DETECTORS, StageGuard
from spider_sense.screening.stage_training import MadeStage, assembled
from spider_sense.screening.trace import Trace
from spider_sense.types import Site

WIDTH, SITE = 32, Site(layer=1, place="resid")
NEVER = 1000.0
"""A threshold that nothing reaches."""


@pytest.fixture
def loaded(agent_loaded: LoadedModel) -> LoadedModel:
    return agent_loaded


@pytest.fixture
def stages(loaded: LoadedModel) -> StageGuard:
    """Probes of all stages, with thresholds for quite other scores."""
    draw, made = torch.Generator().manual_seed(0), []
    for name in DETECTORS:
        probe = Probe(
            name,
            "logistic",
            Aggregator(kind="mean"),
            {SITE: SiteMap(torch.randn(WIDTH, 1, generator=draw), torch.zeros(1))},
        )
        record = Detector(
            name=name,
            family=probe.family,
            sites=(str(SITE),),
            aggregator=probe.aggregator,
            calibration=calibrate(np.full(120, NEVER), np.full(120, 10), [str(place) for place in range(120)]),
            evidence={"files": {}},
        )
        made.append(MadeStage(probe, record, (), ()))
    return assembled(loaded, made, {"test_agents": ["x"]})


def conversations(count: int, seed: int = 0) -> list[Trace]:
    """Return conversations of four stages, no two alike."""
    draw = Random(seed)

    def words() -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(8))

    return [
        Trace(
            id="same name",
            messages=(
                Message(role="user", content=f"Q{words()}"),
                Message(role="assistant", content=f"P{words()}. {written_call('look', {'at': words()})}"),
                Message(role="tool", content=f"O{words()}"),
            ),
        )
        for _ in range(count)
    ]


def scores(loaded: LoadedModel, guard: StageGuard, traces: Sequence[Trace]) -> dict[str, list[float]]:
    reader, sense = ChatSpans(loaded.tokenizer), ModelSense(loaded, guard)
    found: dict[str, list[float]] = {name: [] for name in DETECTORS}
    for trace in traces:
        for sensed in sense.sense(reader.read(trace.messages)):
            for verdict in sensed.verdicts:
                found[verdict.detector].append(verdict.score)
    return found


def set_on(stages: StageGuard, loaded: LoadedModel, traces: Sequence[Trace], **rates: float) -> StageGuard:
    return calibrate_stages(stages, loaded, ChatSpans(loaded.tokenizer), traces, **rates)  # type: ignore[arg-type]


def test_thresholds_are_those_of_the_scores_that_serving_gives(loaded: LoadedModel, stages: StageGuard) -> None:
    traces = conversations(40)
    done = set_on(stages, loaded, traces, suspect_fpr=0.1, breach_fpr=0.05)
    expected = scores(loaded, stages, traces)
    for record in done.guard.manifest.detectors:
        top = sorted(expected[record.name], reverse=True)
        assert len(top) == record.calibration.n == 40
        (bucket, *_), (fourth, fifth) = record.calibration.buckets, top[3:5]
        assert bucket.suspect.exceed == 4
        assert bucket.suspect.value == pytest.approx((fourth + fifth) / 2)
        assert bucket.breach.exceed == 2
        assert record.calibration.horizon_tokens > 5
    # Beforehand nothing was sensed; now the rates hold on the traffic, and something of it is over each threshold.
    assert set(zones(loaded, stages, traces)) == {"clear"}
    assert set(zones(loaded, done, traces)) == {"clear", "suspect", "breach"}
    about = done.guard.manifest.training
    assert about["recalibrated_on"]["spans"] == dict.fromkeys(DETECTORS, 40)
    assert (about["recalibrated_on"]["kept"], about["recalibrated_on"]["replaces"]) == ([], stages.guard.digest)
    assert about["test_agents"] == ["x"]
    # Nothing but thresholds has changed.
    assert done.guard.probes == stages.guard.probes
    assert scores(loaded, done, traces) == expected


def zones(loaded: LoadedModel, guard: StageGuard, traces: Sequence[Trace]) -> list[str]:
    reader, sense = ChatSpans(loaded.tokenizer), ModelSense(loaded, guard)
    return [sensed.zone for trace in traces for sensed in sense.sense(reader.read(trace.messages))]


def test_the_thresholds_hold_on_traffic_that_they_were_not_set_on(loaded: LoadedModel, stages: StageGuard) -> None:
    done = set_on(stages, loaded, conversations(100))
    found = zones(loaded, done, conversations(60, seed=1))
    assert sum(zone != "clear" for zone in found) / len(found) < 0.12


def test_a_stage_without_a_span_keeps_its_thresholds(loaded: LoadedModel, stages: StageGuard) -> None:
    asked = [Trace(id="a", messages=trace.messages[:1]) for trace in conversations(25)]
    done = set_on(stages, loaded, asked)
    before = {record.name: record.calibration for record in stages.guard.manifest.detectors}
    for record in done.guard.manifest.detectors:
        assert (record.calibration == before[record.name]) is (record.name != "query")
    about = done.guard.manifest.training["recalibrated_on"]
    assert (about["spans"], about["kept"]) == ({"query": 25}, ["plan", "action", "observation", DRIFT])


def test_a_span_counts_once(loaded: LoadedModel, stages: StageGuard) -> None:
    traces = conversations(30)
    begun = [Trace(id="b", messages=trace.messages[:2]) for trace in traces]
    done = set_on(stages, loaded, [*begun, *traces, *traces])
    assert {record.calibration.n for record in done.guard.manifest.detectors} == {30}


def test_each_conversation_advances_by_one(loaded: LoadedModel, stages: StageGuard) -> None:
    counts: list[int] = []
    traces = conversations(25)
    calibrate_stages(stages, loaded, ChatSpans(loaded.tokenizer), [*traces, *traces], advance=counts.append)
    assert counts == [1] * 50


def test_what_another_agent_sent_is_an_observation(loaded: LoadedModel, stages: StageGuard) -> None:
    sent = [
        Trace(
            id="s",
            messages=(Message(role="user", content=f"{n} came"), Message(role="user", content=f"{n}", envelope={})),
        )
        for n in range(20)
    ]
    done = set_on(stages, loaded, sent)
    assert done.guard.manifest.training["recalibrated_on"]["spans"] == {"query": 20, "observation": 20}


def test_what_cannot_be_calibrated_on_is_named(
    loaded: LoadedModel, stages: StageGuard, monkeypatch: pytest.MonkeyPatch, tiny_loaded: LoadedModel
) -> None:
    with pytest.raises(DataError, match="no conversation to calibrate on; name a file of benign traces"):
        set_on(stages, loaded, [])
    with pytest.raises(DataError, match="no probe of the guard reads a span of the 1 conversations"):
        set_on(stages, loaded, [Trace(id="s", messages=(Message(role="system", content="Be kind."),))])
    with pytest.raises(
        DataError,
        match=r"18 spans for query cannot show a rate of 0\.05; give 19 .* 99 for .*, or leave the stage's messages",
    ):
        set_on(stages, loaded, conversations(18))
    with pytest.raises(ConfigError, match="a breach must be the rarer of the two"):
        set_on(stages, loaded, conversations(18), suspect_fpr=0.01, breach_fpr=0.05)
    with pytest.raises(MismatchError):
        calibrate_stages(stages, tiny_loaded, ChatSpans(loaded.tokenizer), conversations(20))
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 40)
    with pytest.raises(DataError, match=r"'same name' has \d+ tokens, and the model no more than 40 positions"):
        set_on(stages, loaded, conversations(20))


def test_another_precision_is_certified_if_nothing_of_the_old_is_left(
    loaded: LoadedModel, stages: StageGuard, tmp_path: Path
) -> None:
    half = LoadedModel(
        model=deepcopy(loaded.model).to(torch.bfloat16), tokenizer=loaded.tokenizer, source=loaded.source
    )
    with pytest.raises(MismatchError, match="uncertified"):
        ModelSense(half, stages)
    asked = [Trace(id="a", messages=trace.messages[:1]) for trace in conversations(25)]
    with pytest.raises(DataError, match="no span for plan, action, observation, drift, whose thresholds were set in"):
        set_on(stages, half, asked)
    done = set_on(stages, half, conversations(25))
    done.guard.save_pretrained(tmp_path / "half")
    ModelSense(half, StageGuard.from_pretrained(tmp_path / "half"))
    with pytest.raises(MismatchError, match="uncertified"):
        ModelSense(loaded, done)
