"""What is told of requests arrives in Prometheus' words, from one process and from several."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.policy import Extraction, Policy
from spider_sense.serving.findings import Ended, Note
from spider_sense.serving.prometheus import MARGINS, REQUESTS, GuardMetrics
from spider_sense.types import Action, Zone

COUNT = """
import json, sys
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.serving.prometheus import GuardMetrics

policy = Policy.model_validate_json(sys.argv[3])
GuardMetrics(Guard.from_pretrained(sys.argv[1]), policy, "1.2").count(json.loads(sys.argv[2]))
"""
WATCHING = Policy.default().model_copy(update={"extraction": Extraction(limit="flag", act="stop")})


def ended(action: Action, zone: Zone, margin: float, missing: int = 0) -> Ended:
    coverage = {"scored": 10, "cached": 5, "missing": missing}
    return {"action": action, "zones": [zone], "margins": [margin], "coverage": coverage}


NOTE: Note = {
    "seconds": 0.5,
    "ended": [
        ended("observe", "clear", -1.5),
        ended("stop", "breach", 0.25, missing=3),
        ended("stop", "breach", math.nan),
        ended("observe", "clear", -math.inf),
    ],
    "throttled": [],
    "extraction": {
        "requests": {"folded": 3, "dropped": 2},
        "decisions": [("watch", "own"), ("limit", "own"), ("limit", "own")],
        "store_errors": 4,
        "seconds": [0.02, 0.3],
        "waiting": 7,
    },
    "unrecorded": 6,
}
WANT = {
    ("spider_sense_requests_total", "observe"): 2,
    ("spider_sense_requests_total", "stop"): 2,
    ("spider_sense_requests_total", "flag"): 0,
    ("spider_sense_detector_requests_total", "attention", "clear"): 2,
    ("spider_sense_detector_requests_total", "attention", "suspect"): 0,
    ("spider_sense_detector_requests_total", "attention", "breach"): 2,
    ("spider_sense_peak_margin_logits_bucket", "attention", "-2.0"): 0,
    ("spider_sense_peak_margin_logits_bucket", "attention", "-1.0"): 1,
    ("spider_sense_peak_margin_logits_bucket", "attention", "0.0"): 1,
    ("spider_sense_peak_margin_logits_bucket", "attention", "0.5"): 2,
    ("spider_sense_peak_margin_logits_count", "attention"): 2,
    ("spider_sense_not_a_number_total", "attention"): 1,
    ("spider_sense_extraction_requests_total", "folded"): 3,
    ("spider_sense_extraction_requests_total", "dropped"): 2,
    ("spider_sense_extraction_requests_total", "failed"): 0,
    ("spider_sense_extraction_decisions_total", "limit", "own"): 2,
    ("spider_sense_extraction_decisions_total", "watch", "own"): 1,
    ("spider_sense_extraction_decisions_total", "act", "group"): 0,
    ("spider_sense_extraction_store_errors_total",): 4,
    ("spider_sense_extraction_seconds_count",): 2,
    ("spider_sense_extraction_seconds_bucket", "0.025"): 1,
    ("spider_sense_extraction_seconds_bucket", "0.5"): 2,
    ("spider_sense_tokens_total", "scored"): 40,
    ("spider_sense_tokens_total", "cached"): 20,
    ("spider_sense_tokens_total", "missing"): 3,
    ("spider_sense_incomplete_requests_total",): 1,
    ("spider_sense_host_seconds_total",): 0.5,
    ("spider_sense_unrecorded_events_total",): 6,
}


@pytest.fixture
def folder(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> Path:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def found(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Return every sample of ours by its name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in registry.collect()
        if family.name.startswith("spider_sense_")
        for sample in family.samples
    }


def test_a_note_is_counted(folder: Path) -> None:
    metrics = GuardMetrics(Guard.from_pretrained(folder), WATCHING, "1.2")
    before = found(REGISTRY)
    assert before.keys() >= WANT.keys()
    metrics.count(NOTE)
    after = found(REGISTRY)
    assert {name: after[name] - before[name] for name in WANT} == WANT


def test_actions_that_the_policy_never_takes_have_no_series(folder: Path) -> None:
    REQUESTS.clear()
    GuardMetrics(Guard.from_pretrained(folder), Policy.default(), "1.2")
    shown = {key[1] for key in found(REGISTRY) if key[0] == "spider_sense_requests_total"}
    assert shown == {"observe", "flag", "stop"}


def test_several_processes_add_up(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", COUNT, str(folder), json.dumps(NOTE), WATCHING.model_dump_json()],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared)},
            check=True,
            capture_output=True,
        )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(shared))
    counted = found(registry)
    assert {name: counted[name] for name in WANT} == {name: 2 * value for name, value in WANT.items()}
    info = {key: value for key, value in counted.items() if key[0] == "spider_sense_guard_info"}
    digests = (Guard.from_pretrained(folder).digest, WATCHING.digest, "1.2")
    assert info == {("spider_sense_guard_info", *digests): 1}


def test_a_breach_is_told_from_a_near_miss() -> None:
    assert 0.0 in MARGINS
    assert sorted(MARGINS) == list(MARGINS)
