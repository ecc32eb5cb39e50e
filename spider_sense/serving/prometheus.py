"""A guard's metrics, in the process that serves ``/metrics``: what the scheduler's notes say, counted.

Several such processes may share the work. vLLM then adds up what each has counted, so nothing here reads a value back.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from itertools import product
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from spider_sense.extraction.decision import LEVELS, TIERS
from spider_sense.extraction.feed_counts import Fate, FeedNote
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.serving.findings import Ended, Note
from spider_sense.types import Coverage, Zone

__all__ = ["GuardMetrics"]

MARGINS = (-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Bounds in logits. A margin of exactly 0 is a breach, and stands in the bucket below."""
REQUESTS = Counter("spider_sense_requests_total", "Requests that ended, by the strictest action taken.", ["action"])
ZONES_SEEN = Counter(
    "spider_sense_detector_requests_total",
    "Requests that ended, by the worst zone that each detector found.",
    ["detector", "zone"],
)
PEAK_MARGIN = Histogram(
    "spider_sense_peak_margin_logits",
    "Peak score of a request less its breach threshold, in logits.",
    ["detector"],
    buckets=MARGINS,
)
NOT_NUMBERS = Counter(
    "spider_sense_not_a_number_total",
    "Requests whose score was infinite or not a number, which is a breach.",
    ["detector"],
)
TOKENS = Counter("spider_sense_tokens_total", "Tokens of requests that ended, by what is known of them.", ["coverage"])
INCOMPLETE = Counter("spider_sense_incomplete_requests_total", "Requests that ended with tokens missing.")
UNRECORDED = Counter("spider_sense_unrecorded_events_total", "Events that the audit log did not take.")
SECONDS = Counter("spider_sense_host_seconds_total", "Time that folding and judging took in the workers.")
EXTRACTION_REQUESTS = Counter(
    "spider_sense_extraction_requests_total",
    "Requests offered to the extraction detector, by what became of them: folded, dropped, failed.",
    ["fate"],
)
EXTRACTION_DECISIONS = Counter(
    "spider_sense_extraction_decisions_total", "Decisions about principals, by level and tier.", ["level", "tier"]
)
EXTRACTION_ERRORS = Counter("spider_sense_extraction_store_errors_total", "Times that the store of principals failed.")
EXTRACTION_SECONDS = Histogram(
    "spider_sense_extraction_seconds",
    "From the end of a request's prompt until what it says of its principal is committed.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
EXTRACTION_WAITING = Gauge(
    "spider_sense_extraction_waiting",
    "Requests that wait for the extraction detector.",
    multiprocess_mode="mostrecent",
)
INFO = Gauge(
    "spider_sense_guard_info",
    "The guard and the policy: 1 for those in force, 0 for those that were.",
    ["guard", "policy", "version"],
    multiprocess_mode="max",
)


class GuardMetrics:
    """Counts what becomes of the requests of one engine. Every series is there from the start, at zero.

    Args:
        guard: in force.
        policy: in force.
        version: of this package.
    """

    def __init__(self, guard: Guard, policy: Policy, version: str) -> None:
        self._detectors = [detector.name for detector in guard.manifest.detectors]
        self._info, self._version = INFO.labels(guard.digest, policy.digest, version), version
        self.follow(guard.digest, policy.digest, policy.actions)
        for field in fields(Coverage):
            TOKENS.labels(field.name)
        if policy.extraction is not None:
            for fate in get_args(Fate):
                EXTRACTION_REQUESTS.labels(fate)
            for level, tier in product(LEVELS, TIERS):
                EXTRACTION_DECISIONS.labels(level, tier)
        for name in self._detectors:
            PEAK_MARGIN.labels(name)
            NOT_NUMBERS.labels(name)
            for zone in get_args(Zone):
                ZONES_SEEN.labels(name, zone)

    def follow(self, guard: str, policy: str, actions: Iterable[str]) -> None:
        """Go on with another guard, which has the same detectors, or another policy.

        Args:
            guard: digest.
            policy: digest.
            actions: those that the policy may decide on.
        """
        # Where several processes count no series can be taken away.
        self._info.set(0)
        self._info = INFO.labels(guard, policy, self._version)
        self._info.set(1)
        for action in actions:
            REQUESTS.labels(action)

    def count(self, note: Note) -> None:
        """Count what one step adds."""
        SECONDS.inc(note["seconds"])
        UNRECORDED.inc(note.get("unrecorded", 0))
        for ended in note["ended"]:
            self._count(ended)
        if "extraction" in note:
            _count_extraction(note["extraction"])

    def _count(self, ended: Ended) -> None:
        REQUESTS.labels(ended["action"]).inc()
        for state, tokens in ended["coverage"].items():
            TOKENS.labels(state).inc(tokens)
        if ended["coverage"]["missing"]:
            INCOMPLETE.inc()
        for name, zone, margin in zip(self._detectors, ended["zones"], ended["margins"], strict=True):
            ZONES_SEEN.labels(name, zone).inc()
            if math.isfinite(margin):
                PEAK_MARGIN.labels(name).observe(margin)
            elif margin != -math.inf:  # which is of a detector that had nothing to read yet
                NOT_NUMBERS.labels(name).inc()


def _count_extraction(note: FeedNote) -> None:
    for fate, number in note["requests"].items():
        EXTRACTION_REQUESTS.labels(fate).inc(number)
    for level, tier in note["decisions"]:
        EXTRACTION_DECISIONS.labels(level, tier).inc()
    EXTRACTION_ERRORS.inc(note["store_errors"])
    for seconds in note["seconds"]:
        EXTRACTION_SECONDS.observe(seconds)
    EXTRACTION_WAITING.set(note["waiting"])
