"""Pictures of the extraction bench: requests to detection, and lifetime false alarms by stratum."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
    """Draw, for each cell, the share of attackers that each system has found after so many requests."""
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
            queries = np.array(
                [
                    one.queries
                    for one in outcomes
                    if (one.system, one.embedding, one.scene) == (system, embedding, cell.name)
                ]
            )
            if len(queries):
                found = 100 * (queries[:, None] <= requests).mean(0)
                style = "-" if place < len(COLOURS) else "--"
                width = 2.5 if system == OURS else 1.2
                colour = COLOURS[place % len(COLOURS)]
                picture.step(requests, found, style, color=colour, lw=width, label=system, where="post")
        picture.set(ylim=(0, 103), xscale="log", xlim=(1, config.after))
        picture.xaxis.set_major_formatter("{x:g}")
    pictures[0].legend(fontsize=8, loc="upper left")
    write_png(pictures[0], path)


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
