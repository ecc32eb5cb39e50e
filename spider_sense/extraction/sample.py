"""A sample of a principal's requests: what linked accounts are compared by, request by request.

Each request is in it with the same probability, whatever the life (Vitter 1985, algorithm R), so that long lives and
short ones show the same of themselves. Of a request it holds the logit of the probe for all campaigns, and the sketch
in steps of a quarter of what differs inside one honest principal.

Shape letters: N principals with one request each, K places of the sample, S sketch.
"""

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import SAMPLE, States
from spider_sense.extraction.mixing import mix

__all__ = ["sample", "sampled"]

STEP = 0.25
"""Of a sketch's coordinate."""

_STREAM = np.uint64(0x2545F4914F6CDD1D)
"""Keeps these random numbers apart from others of the same seed."""


def sample(states_N: States, batch: EventBatch) -> None:
    """Put the requests into the samples, or leave them out, in place.

    Args:
        states_N: whose they are; ``sketched`` counts this request.
        batch: N requests.
    """
    count_N = np.maximum(states_N["sketched"].astype(np.uint64), 1)
    drawn_N = mix(states_N["seed"] ^ _STREAM, count_N) % count_N
    place_N = np.where(count_N <= SAMPLE, count_N - 1, drawn_N).astype(np.int64)
    rows = np.flatnonzero(np.isfinite(batch.sketch[:, 0]) & (place_N < SAMPLE))
    steps_NS = np.clip(np.rint(batch.sketch[rows] / STEP), -127, 127)
    states_N["sample"][rows, place_N[rows]] = steps_NS.astype(np.int8)
    states_N["sample_logits"][rows, place_N[rows]] = batch.probes[rows, 0]


def sampled(state: np.void) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the logits [K] and the sketches [K, S], in steps, of one principal's sample."""
    kept = min(int(state["sketched"]), SAMPLE)
    return state["sample_logits"][:kept], state["sample"][:kept].astype(np.float32)
