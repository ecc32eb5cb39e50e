"""How much of the output matrix a logit sweep has read when it is found, and what honest classifiers trigger."""

import math
from typing import Any

from spider_sense.extraction.bench.ours import Ours
from spider_sense.extraction.simulator.sweeps import classifier, sweep

__all__ = ["sweep_figures"]

_BIASED = (1, 5, 20, 100, 300)
_REQUESTS = 3000
_CLASSIFIERS, _THEIR_REQUESTS = 100, 400


def sweep_figures(ours: Ours, texts: list[str], vocabulary: int, width: int, seed: int) -> dict[str, Any]:
    """Return the share of the rank that the slowest finding leaves to each kind of sweep, and the false alarms.

    With k biased tokens a request, r requests of one token show R = r k logits of as many different ones, of V at most:
    a rank of at most ``min(V, sqrt(R))`` of the ``width`` that spans the matrix.

    Args:
        ours: the detector.
        texts: prompts to send.
        vocabulary: V.
        width: rank of the output matrix.
        seed: of the sweeps.

    Returns:
        ``rank_share`` by biased tokens a request, None if not found, and ``false_alarms``, ``classifiers``.
    """
    sweeps = [sweep(f"sweep-{biased}", vocabulary, _REQUESTS, seed, biased=biased, prompts=texts) for biased in _BIASED]
    shares: dict[str, float | None] = {}
    requests: dict[str, int | None] = {}
    for biased, by_tier in zip(_BIASED, ours.alarms_by_tier(sweeps), strict=True):
        count = by_tier["rule"]
        requests[str(biased)] = count or None
        shares[str(biased)] = min(vocabulary, math.sqrt(count * biased)) / width if count else None
    honest = [
        classifier(f"classifier-{place}", texts, vocabulary, _THEIR_REQUESTS, seed, 2 + place % 60)
        for place in range(_CLASSIFIERS)
    ]
    alarmed = sum(bool(by_tier["rule"]) for by_tier in ours.alarms_by_tier(honest))
    return {"rank_share": shares, "requests": requests, "false_alarms": alarmed, "classifiers": len(honest)}
