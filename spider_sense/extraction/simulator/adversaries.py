"""Attackers who know the detector, all but its key: what they make of a campaign's list of requests.

Each returns the requests that are left or changed. What an attacker gives up is the share of the list that is not sent.

Shape letters: N requests, M cover requests, S sketch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import ConfigError
from spider_sense.extraction.simulator.families import Family

__all__ = ["batched", "matched", "paraphrased", "partitioned", "unsuspicious"]

Floats = NDArray[np.floating[Any]]

_PREFACES = ("", "Hi, ", "Please: ", "One more. ", "ok next: ", "Quick one - ", "For my notes: ", "Hello again! ")


def paraphrased(campaign: Family, seed: int) -> tuple[str, ...]:
    """Return the texts of a campaign, each in one of all its wrappers behind one of eight prefaces."""
    generator = np.random.default_rng(seed)
    wrappers = generator.integers(len(campaign.wrappers), size=len(campaign.texts)).tolist()
    prefaces = generator.integers(len(_PREFACES), size=len(campaign.texts)).tolist()
    return tuple(
        _PREFACES[preface] + campaign.wrappers[wrapper].replace("{payload}", text)
        for text, wrapper, preface in zip(campaign.texts, wrappers, prefaces, strict=True)
    )


def matched(texts: Sequence[str], sketch_NS: Floats, cover_MS: Floats, keep: float) -> tuple[str, ...]:
    """Return the share ``keep`` of the requests whose sketches are nearest to an account's own cover by cosine."""
    _check_share(keep)
    similarity_NM = _unit(sketch_NS) @ _unit(cover_MS).T
    order = np.argsort(-similarity_NM.max(1))[: max(1, round(keep * len(texts)))]
    return tuple(texts[index] for index in sorted(order.tolist()))


def unsuspicious(texts: Sequence[str], score_N: Floats, limit: float) -> tuple[str, ...]:
    """Return the requests that an attacker's copy of the probes scores below a limit."""
    return tuple(text for text, score in zip(texts, score_N.tolist(), strict=True) if score < limit)


def partitioned(texts: Sequence[str], sketch_NS: Floats, parts: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Return the requests by topic, so that every account looks narrow; a part that is empty is left out.

    Raises:
        ConfigError: unless there are as many requests as parts.
    """
    if not 1 <= parts <= len(texts):
        raise ConfigError(f"{parts} parts of {len(texts)} requests; choose 1 to {len(texts)}")
    from scipy.cluster.vq import kmeans2

    unit_NS = _unit(sketch_NS)
    _, part_N = kmeans2(unit_NS, min(parts, len(np.unique(unit_NS.round(6), axis=0))), minit="++", seed=seed)
    groups = [tuple(np.array(texts, dtype=object)[part_N == part]) for part in range(parts)]
    return tuple(group for group in groups if group)


def batched(texts: Sequence[str], size: int) -> tuple[str, ...]:
    """Return requests that hold ``size`` questions each, numbered; a rest that is too small is left out.

    Raises:
        ConfigError: unless there are as many texts as ``size``.
    """
    if not 1 <= size <= len(texts):
        raise ConfigError(f"{size} questions a request of {len(texts)} texts; choose 1 to {len(texts)}")
    return tuple(
        "\n".join(f"{place}. {text}" for place, text in enumerate(texts[first : first + size], start=1))
        for first in range(0, len(texts) - size + 1, size)
    )


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ConfigError(f"keep={keep}; choose a share above 0 and at most 1")


def _unit(rows_NS: Floats) -> Floats:
    norm: Floats = rows_NS / np.maximum(np.linalg.norm(rows_NS, axis=1, keepdims=True), 1e-9)
    return norm
