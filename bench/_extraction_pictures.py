"""Pictures of the extraction bench: requests to detection, and lifetime false alarms by stratum."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nest.pictures.canvas import COLOURS, panels, write_png
from spider_sense.extraction.bench.config import BenchConfig
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.extraction.bench.report import OURS, Report

SHOWN = {
    ("first", 1.0): "a campaign from the first request",
    ("pivot", 1.0): "all requests turn to a campaign",
    ("pivot", 0.5): "half of them do",
}
"""Starts and shares of the cells that are drawn, and what they are."""


def draw_queries(outcomes: Sequence[Outcome], config: BenchConfig, path: Path) -> None:
    """Draw, for each cell, the share of attackers that each system has found after so many requests, and limited if
    that is ours."""
    shown = [cell for cell in config.cells if cell.cover == "same" and (cell.start, cell.share) in SHOWN]
    pictures = panels(
        [SHOWN[cell.start, cell.share] for cell in shown],
        "requests since the campaign began",
        "attackers found, %",
        (5.0 * len(shown), 4.5),
    )
    text = "wordllama" if "wordllama" in config.embeddings else config.embeddings[0]
    systems = sorted({one.system for one in outcomes}, key=lambda name: (name != OURS, name))
    requests = np.arange(1, config.after + 1)
    for picture, cell in zip(pictures, shown, strict=True):
        for place, system in enumerate(systems):
            embedding = config.embeddings[0] if system == OURS else text
            mine = [one for one in outcomes if (one.system, one.embedding, one.scene) == (system, embedding, cell.name)]
            if mine:
                style = "-" if place < len(COLOURS) else "--"
                how = {"color": COLOURS[place % len(COLOURS)], "where": "post"}
                width = 2.5 if system == OURS else 1.2
                picture.step(
                    requests, _share([one.queries for one in mine], requests), style, lw=width, label=system, **how
                )
                if system == OURS:
                    limited = _share([one.queries_to_limit for one in mine], requests)
                    picture.step(requests, limited, ":", lw=2, label=f"{system}, limited", **how)
        picture.set(ylim=(0, 103), xscale="log", xlim=(1, config.after))
        picture.xaxis.set_major_formatter("{x:g}")
    pictures[0].legend(fontsize=8, loc="upper left")
    write_png(pictures[0], path)


def _share(queries: Sequence[float], requests: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the percentage that is found by each number of requests."""
    result: NDArray[np.float64] = 100 * (np.array(queries)[:, None] <= requests).mean(0)
    return result


def draw_lifetime(report: Report, config: BenchConfig, path: Path) -> None:
    """Draw the share of innocent principals that are ever alarmed, by stratum, with intervals and the nominal rate."""
    strata = {
        "all": {"rate": report["lifetime_fpr"], "low": report["lifetime_fpr_low"], "high": report["lifetime_fpr_high"]}
    } | report["lifetime_fpr_by_stratum"]
    strata["families that\ncalibration saw"] = report["lifetime_fpr_seen_families"]
    (picture,) = panels(
        ["Innocent principals that are ever alarmed, families that calibration never saw"], "", "%", (9.0, 4.5)
    )
    for place, figure in enumerate(strata.values()):
        rate, low, high = (100 * figure[key] for key in ("rate", "low", "high"))
        picture.errorbar(place, rate, [[rate - low], [high - rate]], fmt="o", color=COLOURS[0], capsize=4)
    picture.axhline(100 * config.alpha, color=COLOURS[1], ls="--", label="nominal")
    picture.set_xticks(range(len(strata)), list(strata))
    picture.set_ylim(bottom=0)
    picture.legend()
    write_png(picture, path)
