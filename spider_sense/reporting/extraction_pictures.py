"""Pictures of a ruling on extraction, as PNG in a data address."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import MissingExtraError
from spider_sense.extraction.decision import Decision, Tier
from spider_sense.extraction.groups import Group
from spider_sense.extraction.ruling import Ruling
from spider_sense.extraction.thresholds import Calibration
from spider_sense.printable import printable

__all__ = ["calibration_picture", "groups_picture", "timeline_picture"]

COLOURS = {"own": "#0072b2", "level": "#d55e00", "group": "#009e73", "rule": "#cc79a7"}
"""Of the tiers; told apart with every kind of colour blindness (Okabe and Ito, 2008)."""
QUIET = "#999999"
DPI = 130
SHOWN = 8
"""Groups that are drawn."""
NAMED = 12
"""Members of a group up to which each is named."""


def timeline_picture(ruling: Ruling, principal: str, thresholds: Mapping[Tier, float]) -> str:
    """Draw a principal's two statistics along its requests, each with its threshold, and what was decided when."""
    figure, axes = _axes(f"requests of {_short(principal)}", "statistic (running maximum)", (8.5, 3.2))
    trail = ruling.trails[principal]
    count = np.arange(1, len(trail) + 1)
    tiers: tuple[tuple[Tier, str], ...] = (("own", "own history"), ("level", "level"))
    for column, (tier, name) in enumerate(tiers):
        axes.step(count, _finite(trail[:, column]), where="post", color=COLOURS[tier], label=name)
        if math.isfinite(thresholds[tier]):
            axes.axhline(thresholds[tier], color=COLOURS[tier], linestyle=":", label=f"threshold, {name}")
    for decision in ruling.decisions:
        if decision.principal == principal and decision.tier in ("own", "level", "rule"):
            axes.axvline(decision.count, color=COLOURS[decision.tier], alpha=0.35)
            axes.annotate(
                decision.level,
                (decision.count, 1.0),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
                color=COLOURS[decision.tier],
            )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _address(figure)


def groups_picture(groups: Sequence[Group], worst: Mapping[str, Decision]) -> str:
    """Draw the largest linked groups, each a ring of its members; filled ones are limited or acted on."""
    shown = groups[:SHOWN]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure = _figure((3.0 * columns, 3.1 * rows))
    for place, group in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        _ring(axes, group, worst)
    return _address(figure)


def calibration_picture(p_values: Mapping[Tier, NDArray[np.float64]], calibration: Calibration) -> str:
    """Draw which share of this log's principals has a p-value of at most alpha, against alpha.

    Honest principals follow the diagonal, or lie below it where most of calibration lived short; a share above it at
    small alpha is what the thresholds cut off.
    """
    figure, axes = _axes("alpha", "share of principals with p <= alpha", (5.6, 4.2))
    least = 1 / (max(len(values) for values in calibration.maxima["own"].values()) + 1)
    low = max(least / 2, 1e-5)
    axes.plot([low, 1], [low, 1], color=QUIET, linestyle="--", label="honest and exchangeable")
    for tier, values in p_values.items():
        if len(values):
            ordered = np.sort(values)
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, share, where="post", color=COLOURS[tier], label=f"{tier}, {len(values)} principals")
            axes.axvline(calibration.budget.share(tier), color=COLOURS[tier], linestyle=":", alpha=0.6)
    axes.set(xscale="log", yscale="log", xlim=(low, 1.1), ylim=(low, 1.3))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _address(figure)


def _ring(axes: Any, group: Group, worst: Mapping[str, Decision]) -> None:
    angle = {name: 2 * math.pi * index / len(group.members) for index, name in enumerate(group.members)}
    place = {name: (math.cos(turn), math.sin(turn)) for name, turn in angle.items()}
    for edge in group.edges:
        (x0, y0), (x1, y1) = place[edge.one], place[edge.other]
        axes.plot([x0, x1], [y0, y1], color=QUIET, linewidth=0.6, alpha=max(0.15, 4 / len(group.edges)), zorder=1)
    for name, (x, y) in place.items():
        alarmed = name in worst and worst[name].level != "watch"
        axes.scatter(x, y, s=42, zorder=2, color=COLOURS["group"] if alarmed else "white", edgecolors=COLOURS["group"])
        if len(group.members) <= NAMED:
            axes.annotate(_short(name, 10), (1.2 * x, 1.14 * y), ha="center", va="center", fontsize=6.5)
    kinds = sorted({kind for edge in group.edges for kind in edge.kinds})
    axes.set_title(f"{len(group.members)} accounts\n{', '.join(kinds)}", fontsize=8)
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.45, 1.45), aspect="equal")
    axes.axis("off")


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)


def _short(name: str, most: int = 24) -> str:
    name = name if len(name) <= most else f"{name[: most - 3]}..."
    # matplotlib reads what stands between dollar signs as mathematics, and draws a box for what its font lacks.
    return printable(name).encode("ascii", "backslashreplace").decode("ascii").replace("$", r"\$")


def _axes(x: str, y: str, size: tuple[float, float]) -> tuple[Any, Any]:
    figure = _figure(size)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "extraction") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _address(figure: Any) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode('ascii')}"
