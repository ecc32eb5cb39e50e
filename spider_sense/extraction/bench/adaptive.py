"""Attackers who know everything but the key, and what they give up."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.bench.config import Cell
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.extraction.bench.seed_run import SeedRun
from spider_sense.extraction.bench.systems import System
from spider_sense.extraction.bench.texts import BATCH
from spider_sense.extraction.simulator.adversaries import batched, matched, paraphrased, unsuspicious
from spider_sense.extraction.simulator.campaigns import Mixing, attacker, work_list
from spider_sense.extraction.simulator.families import Family
from spider_sense.extraction.simulator.traffic import Stream

__all__ = ["adaptive_outcomes"]

_KEPT = 0.25
"""Share of the list that an attacker who matches personas sends."""
_UNSUSPICIOUS = 0.95
"""Quantile of innocent requests' highest probe logit that an attacker with a copy of the probes stays below."""
_BATCHED = f"{BATCH} questions a request"

Floats = NDArray[np.floating[Any]]


def adaptive_outcomes(run: SeedRun, system: System, sketch_NS: Floats, score_N: Floats) -> dict[str, Any]:
    """Return outcomes by attacker, and the share of the list that each is left with.

    Args:
        run: parts of the seed.
        system: who is attacked.
        sketch_NS: of every text, which an attacker is granted.
        score_N: highest probe logit of every text, likewise.

    Returns:
        Name to ``{"outcomes": list of Outcome, "left": share of requests}``.
    """
    found: dict[str, Any] = {}
    plain = Cell(share=1.0, cover="same", start="first")
    for name, cell in (
        ("as it is", plain),
        ("paraphrased", plain),
        ("persona-matched", plain),
        ("probe oracle", plain),
        (_BATCHED, plain),
        ("poisoned history", Cell(share=1.0, start="poison")),
        ("slow drip at a quarter", Cell(share=0.25, start="drip")),
    ):
        streams: list[Stream] = []
        left = []
        for campaign in run.scene.campaigns():
            texts = tuple(_texts(name, run, campaign, sketch_NS, score_N))
            left.append(len(texts) * (BATCH if name == _BATCHED else 1) / len(campaign.texts))
            streams += _streams(run, campaign, cell, texts, name)
        outcomes: list[Outcome] = run.outcomes(system, f"adaptive: {name}", streams) if streams else []
        found[name] = {"outcomes": outcomes, "left": float(np.mean(left))}
    return found


def _texts(name: str, run: SeedRun, campaign: Family, sketch_NS: Floats, score_N: Floats) -> Sequence[str]:
    texts = campaign.wrapped()
    rows = [run.material.index[text] for text in texts]
    match name:
        case "paraphrased":
            return paraphrased(campaign, 0)
        case "persona-matched":
            cover = next(iter(_covers(run, campaign)))
            cover_rows = [run.material.index[text] for text, _ in zip(cover, range(60), strict=False)]
            return matched(texts, sketch_NS[rows], sketch_NS[cover_rows], _KEPT)
        case "probe oracle":
            limit = float(np.quantile(score_N[run.material.rows(run.fit)], _UNSUSPICIOUS))
            return unsuspicious(texts, score_N[rows], limit)
        case _ if name == _BATCHED:
            return batched(campaign.texts, BATCH)
    return texts


def _covers(run: SeedRun, campaign: Family) -> Iterator[Iterator[str]]:
    yield from (tenant.cover() for tenant in run.scene.covers("test", f"adaptive-{campaign.name}")("same"))


def _streams(run: SeedRun, campaign: Family, cell: Cell, texts: Sequence[str], name: str) -> list[Stream]:
    if not texts:
        return []
    scene, streams = run.scene, []
    mixing = Mixing(share=cell.share, cover=cell.cover, start=cell.start, warm_up=scene.config.warm_up)
    for place in range(scene.config.attackers):
        account = f"{name}-{campaign.name}-{place}"
        generator = np.random.default_rng([scene.seed, *account.encode()])
        requests = work_list(campaign, generator, texts)
        stream = attacker(
            account,
            campaign,
            mixing,
            scene.covers("test", account),
            scene.config.after + (scene.config.warm_up if cell.start == "poison" else 0),
            scene.seed,
            texts=requests,
        )
        streams.append(replace(stream, principal=account))
    return streams
