"""A plot frame as inline SVG: two scales, a grid, and marks in the frame's own units."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Figure", "Scale", "round_ticks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From values to pixels; what lies outside the range is drawn at its edge."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 2)


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers between two values, about so many."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]


@dataclass(slots=True)
class Figure:
    """Collects marks and writes them as one ``<svg>``.

    Classes name what a mark is; the page's style sheet says how it looks in light and in dark.
    """

    title: str
    """Read out instead of the picture."""
    x: Scale
    y: Scale
    width: int = 480
    height: int = 300
    marks: list[str] = field(default_factory=list)

    def grid(self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]], x_name: str, y_name: str) -> None:
        """Draw labelled grid lines and name the axes."""
        left, right, bottom, top = self.x.start, self.x.stop, self.y.start, self.y.stop
        for value, text in ys:
            self._line(left, self.y(value), right, self.y(value), "grid")
            self.text(left - 8, self.y(value) + 4, text, "tick end")
        for value, text in xs:
            self._line(self.x(value), bottom, self.x(value), bottom + 4, "axis")
            self.text(self.x(value), bottom + 18, text, "tick middle")
        self._line(left, bottom, right, bottom, "axis")
        self.text((left + right) / 2, bottom + 38, x_name, "name middle")
        self.text(left - 34, top - 14, y_name, "name")

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draw a line through points in data units."""
        places = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        self.marks.append(f'<polyline class="line {html.escape(style)}" points="{places}"/>')

    def rule(self, y: float, text: str, style: str, below: bool = False) -> None:
        """Draw a horizontal line right across and write above or below its end."""
        self._line(self.x.start, self.y(y), self.x.stop, self.y(y), style)
        self.text(self.x.stop, self.y(y) + (16 if below else -6), text, f"{style} end")

    def upright(self, x: float, style: str) -> None:
        """Draw a vertical line from bottom to top."""
        self._line(self.x(x), self.y.start, self.x(x), self.y.stop, style)

    def dot(self, x: float, y: float, style: str, tip: str) -> None:
        """Draw a dot with a tooltip."""
        self.marks.append(
            f'<circle class="dot {html.escape(style)}" cx="{self.x(x)}" cy="{self.y(y)}" r="4">'
            f"<title>{html.escape(tip)}</title></circle>"
        )

    def text(self, x: float, y: float, text: str, style: str) -> None:
        """Write at a pixel."""
        self.marks.append(f'<text class="{html.escape(style)}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>')

    def svg(self) -> str:
        """Return the figure."""
        title = html.escape(self.title)
        box = f"0 0 {self.width} {self.height}"
        return f'<svg viewBox="{box}" role="img" aria-label="{title}">{"".join(self.marks)}</svg>'

    def band(self, low: float, high: float, style: str) -> None:
        """Shade from one x to another, from bottom to top."""
        left, top = self.x(low), self.y.stop
        self.marks.append(
            f'<rect class="{html.escape(style)}" x="{left}" y="{top}" '
            f'width="{self.x(high) - left:.2f}" height="{self.y.start - top}"/>'
        )

    def _line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.marks.append(f'<line class="{html.escape(style)}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
