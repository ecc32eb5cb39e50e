"""An empty picture in the style that all of them share, and how it becomes a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.folders import check_writable

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "nest") from error

__all__ = ["COLOURS", "axes", "legend", "panels", "points", "write_png"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#882255")
"""Told apart with every kind of colour blindness (Okabe and Ito, 2008; the last is of Tol's muted scheme)."""
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


def panels(titles: Sequence[str], x: str, y: str, size: tuple[float, float], heading: str = "") -> list[Any]:
    """Return axes side by side in one new picture, one a title, which show the same things; see :func:`axes`.

    Args:
        titles: stand above the axes.
        x: see there.
        y: see there.
        size: of the whole picture.
        heading: stands above all of them.
    """
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(heading)
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


def points(
    picture: Any,
    across: Sequence[Mapping[str, float]],
    up: Sequence[Mapping[str, float]],
    colour: str,
    form: str = "o",
    label: str | None = None,
) -> None:
    """Draw figures against figures with both their intervals, which are fainter than the points.

    Args:
        picture: axes.
        across: horizontal places: ``value``, ``low`` and ``high``.
        up: vertical places, as many.
        colour: a hexadecimal one.
        form: marker and line, as matplotlib writes them.
        label: for the legend; None leaves it out.
    """
    picture.errorbar(
        [figure["value"] for figure in across],
        [figure["value"] for figure in up],
        xerr=_reach(across),
        yerr=_reach(up),
        fmt=form,
        color=colour,
        ecolor=colour + "60",
        markersize=5,
        linewidth=1.3,
        elinewidth=1,
        label=label,
    )


def _reach(figures: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Return how far intervals reach below and above their figures."""
    below = [max(figure["value"] - figure["low"], 0.0) for figure in figures]
    return [below, [max(figure["high"] - figure["value"], 0.0) for figure in figures]]


def legend(drawn: Any) -> None:
    """Put the legend of axes beside their picture, where no curve is hidden by it."""
    lines, labels = drawn.get_legend_handles_labels()
    drawn.figure.legend(lines, labels, frameon=False, loc="outside right center", fontsize="small")


def write_png(drawn: Any, path: Path) -> Path:
    """Write the picture that axes belong to.

    Args:
        drawn: the axes.
        path: the file; without an ending it gets ``.png``.

    Returns:
        The file that was written.

    Raises:
        ConfigError: if the name has another ending, or cannot be written.
    """
    file = path if path.suffix or path.name in ("", "..") else path.with_suffix(".png")
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ConfigError(f"cannot write {file}: pictures are PNG files; name a file that ends in .png")
    check_writable(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.figure.savefig(file, dpi=DPI)
    return file
