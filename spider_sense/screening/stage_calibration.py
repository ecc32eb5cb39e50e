"""Set the thresholds of the stages anew, on an operator's own benign conversations, scored as serving scores them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spider_sense.calibration import calibrate, check_rates, least_for
from spider_sense.errors import DataError
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import Detector, Guard
from spider_sense.layouts import positions
from spider_sense.models import LoadedModel
from spider_sense.screening.protocols import SpanReader
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.stage_guard import StageGuard
from spider_sense.screening.trace import Trace
from spider_sense.training.recalibration import check_same_model
from spider_sense.types import Verdict

__all__ = ["calibrate_stages"]

Scored = dict[str, dict[str, Verdict]]
"""By detector: the verdict on each span, by the digest of the tokens up to its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    """Shares of benign spans that may reach the thresholds."""

    suspect_fpr: float
    breach_fpr: float


def calibrate_stages(
    stages: StageGuard,
    loaded: LoadedModel,
    reader: SpanReader,
    traces: Sequence[Trace],
    *,
    suspect_fpr: float = 0.05,
    breach_fpr: float = 0.01,
    advance: Callable[[int], None] | None = None,
) -> StageGuard:
    """Return the guard with thresholds set on the spans of benign conversations; a stage without a span keeps its own.

    A span that was read before with the same tokens before it counts once: one who records each request of a loop
    records what went before again and again.

    Args:
        stages: the probes.
        loaded: the model, served as it will be; no other configuration is certified afterwards.
        reader: finds the stages.
        traces: benign conversations.
        suspect_fpr: share of benign spans that may be suspect or worse by each probe; an observation has two.
        breach_fpr: share of benign spans that may be a breach by each probe. With fewer spans than this rate needs
            there is none; see :func:`spider_sense.screening.stage_guard.stage_zone`.
        advance: called with 1 after each conversation.

    Raises:
        ConfigError: unless 0 < breach_fpr <= suspect_fpr < 1; if a conversation cannot be rendered.
        DataError: if there is no conversation or span, one is longer than the model's positions, a stage has fewer
            spans than ``suspect_fpr`` needs, or a score is not finite; if a stage would keep thresholds that were set
            in another configuration.
        MismatchError: if the probes were made for another model.
    """
    check_rates(suspect_fpr, breach_fpr)
    if not traces:
        raise DataError("no conversation to calibrate on; name a file of benign traces, a JSON line each")
    guard, found, serving = stages.guard, fingerprint(loaded), serving_config(loaded.model)
    check_same_model(guard, found, serving)
    served = guard.manifest.model_copy(update={"certified": (serving,), "fingerprint": found})
    sense = ModelSense(loaded, StageGuard(replace(guard, manifest=served)))
    scored = _scored(sense, positions(loaded.model), reader, traces, advance or (lambda count: None))
    rates = _Rates(suspect_fpr=suspect_fpr, breach_fpr=breach_fpr)
    detectors = tuple(_anew(record, scored.get(record.name, {}), rates) for record in served.detectors)
    about = _about(guard, traces, scored)
    if about["kept"] and serving not in guard.manifest.certified:
        raise DataError(
            f"no span for {', '.join(about['kept'])}, whose thresholds were set in another configuration than "
            f"{serving.model_dump_json()}; add conversations that have some"
        )
    update = {"detectors": detectors, "training": served.training | {"recalibrated_on": about}}
    return StageGuard(replace(guard, manifest=served.model_copy(update=update)))


def _scored(
    sense: ModelSense, limit: int | None, reader: SpanReader, traces: Sequence[Trace], advance: Callable[[int], None]
) -> Scored:
    scored: Scored = {}
    for trace in traces:
        conversation = reader.read(trace.messages, trace.tools or ())
        if limit is not None and len(conversation.ids) > limit:
            raise DataError(
                f"conversation {trace.id!r} has {len(conversation.ids)} tokens, and the model no more than {limit} "
                "positions, so no probe reads it; shorten it or leave it out"
            )
        for sensed in sense.sense(conversation):
            for verdict in sensed.verdicts:
                read = json.dumps(conversation.ids[: verdict.position + 1])
                scored.setdefault(verdict.detector, {})[hashlib.sha256(read.encode()).hexdigest()] = verdict
        advance(1)
    if not scored:
        raise DataError(f"no probe of the guard reads a span of the {len(traces)} conversations; add others")
    return scored


def _anew(record: Detector, found: Mapping[str, Verdict], rates: _Rates) -> Detector:
    if not found:
        return record
    needed = least_for(rates.suspect_fpr)
    if len(found) < needed:
        raise DataError(
            f"{len(found)} spans for {record.name} cannot show a rate of {rates.suspect_fpr:g}; give {needed} or more, "
            f"and {least_for(rates.breach_fpr)} for a breach at {rates.breach_fpr:g}, "
            "or leave the stage's messages out, and it keeps its thresholds"
        )
    scores = np.array([verdict.score for verdict in found.values()])
    tokens = np.array([verdict.coverage.scored for verdict in found.values()])
    placed = calibrate(scores, tokens, list(found), rates.suspect_fpr, rates.breach_fpr)
    return record.model_copy(update={"calibration": placed})


def _about(guard: Guard, traces: Sequence[Trace], scored: Scored) -> dict[str, Any]:
    names = [record.name for record in guard.manifest.detectors]
    return {
        "conversations": len(traces),
        "spans": {name: len(scored[name]) for name in names if name in scored},
        "kept": [name for name in names if name not in scored],
        "replaces": guard.digest,
    }
