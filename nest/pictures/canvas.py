"""An empty picture in the style that all of them share, and how it becomes a PNG."""

from pathlib import Path
from typing import Any

from spider_sense.errors import MissingExtraError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "nest") from error

__all__ = ["COLOURS", "axes", "write_png"]

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
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    result = figure.add_subplot()
    result.set(title=title, xlabel=x, ylabel=y)
    result.spines[["top", "right"]].set_visible(False)
    result.grid(axis="y", alpha=0.3)
    result.set_axisbelow(True)
    return result


def write_png(drawn: Any, path: Path) -> None:
    """Write the picture that axes belong to."""
    drawn.figure.savefig(path, dpi=DPI)
