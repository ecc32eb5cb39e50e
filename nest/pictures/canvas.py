"""An empty picture in the style that all of them share, and how it becomes a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spider_sense.errors import MissingExtraError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "nest") from error

__all__ = ["COLOURS", "axes", "panels", "write_png"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
"""Told apart with every kind of colour blindness (Okabe and Ito, 2008)."""
DPI = 150


def axes(title: str, x: str, y: str, size: tuple[float, float] = (9.0, 4.5)) -> Any:
    """Return the axes of a new picture; no window and no global state is involved.

    Args:
        title: stands above.
        x: what the horizontal axis shows, with its unit.
        y: what the vertical axis shows.
        size: width and height in inches.
    """
    return panels([title], x, y, size)[0]


def panels(titles: Sequence[str], x: str, y: str, size: tuple[float, float]) -> list[Any]:
    """Return axes side by side in one new picture, one a title, which show the same things; see :func:`axes`."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    result = []
    for place, title in enumerate(titles):
        one = figure.add_subplot(1, len(titles), place + 1)
        one.set(title=title, xlabel=x, ylabel=y if place == 0 else "")
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.3)
        one.set_axisbelow(True)
        result.append(one)
    return result


def write_png(drawn: Any, path: Path) -> None:
    """Write the picture that axes belong to."""
    drawn.figure.savefig(path, dpi=DPI)
