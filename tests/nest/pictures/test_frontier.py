"""The picture of the frontier."""

from pathlib import Path
from typing import Any

import pytest

from nest.pictures import frontier
from nest.pictures.canvas import COLOURS


def point(asr: float, refused: float) -> dict[str, Any]:
    return {
        name: {"value": value, "low": value - 0.02, "high": value + 0.04}
        for name, value in (("asr", asr), ("over_refusal_borderline", refused))
    }


def test_every_curve_begins_at_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(frontier, "write_png", lambda axes, path: drawn.append(axes))
    arms = {
        "base": {"alpha": {"0": point(0.9, 0.02)}, "steps": {}},
        "nest": {"alpha": {"1": point(0.3, 0.2), "0.5": point(0.6, 0.1)}, "steps": {}},
        **{f"other{i}": {"alpha": {"1": point(0.5, 0.1)}, "steps": {}} for i in range(len(COLOURS) - 2)},
        "guarded": {"alpha": {"1": point(0.4, 0.05)}, "steps": {}},
    }
    frontier.draw_frontier(arms, Path("unused.png"))
    (picture,) = drawn[0].figure.axes
    lines = {part.get_label(): part.lines[0] for part in picture.containers}
    assert list(lines) == list(arms)
    assert list(lines["nest"].get_xdata()) == pytest.approx([2, 10, 20]), "in order of strength"
    assert list(lines["nest"].get_ydata()) == pytest.approx([90, 60, 30])
    assert list(lines["base"].get_xdata()) == pytest.approx([2])
    looks = {(line.get_color(), line.get_linestyle()) for line in lines.values()}
    assert len(looks) == len(lines), "no two arms look alike"
    left, right = picture.get_xlim()
    assert left < 0
    assert 24 < right < 30
