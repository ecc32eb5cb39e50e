"""The picture of safety against what it costs."""

from pathlib import Path
from typing import Any

import pytest

from nest.pictures import compare
from spider_sense.errors import ConfigError, DataError


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.1, "n": 20}


RESULTS: dict[str, dict[str, Any]] = {
    "base": {"asr": figure(0.9), "asr_jailbreak": figure(0.8), "utility": figure(0.5), "perplexity": figure(30.0)},
    "nest": {"asr": figure(0.1), "asr_jailbreak": None, "utility": figure(0.45), "perplexity": figure(31.0)},
}


def test_every_arm_is_a_point_with_its_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(compare, "write_png", lambda axes, path: drawn.append(axes))
    compare.draw_comparison(RESULTS, "utility", Path("unused.png"))
    direct, wrapped = drawn[0].figure.axes
    series = {part.get_label(): part for part in direct.containers}
    assert list(series) == ["base", "nest"]
    assert [part.get_label() for part in wrapped.containers] == ["base"], "nest has no such figure"
    assert (direct.get_title(), wrapped.get_title()) == ("direct prompts", "jailbreak wrappers")
    point, _, bars = series["nest"].lines
    assert [*point.get_xdata(), *point.get_ydata()] == pytest.approx([45.0, 10.0])
    ends = sorted(value for bar in bars for segment in bar.get_segments() for value in segment.flatten())
    assert ends == pytest.approx(sorted([40, 10, 55, 10, 45, 5, 45, 20]))


def test_a_figure_that_is_no_share_is_drawn_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(compare, "write_png", lambda axes, path: drawn.append(axes))
    compare.draw_comparison(RESULTS, "perplexity", Path("unused.png"))
    assert list(drawn[0].containers[0].lines[0].get_xdata()) == [30.0]


def test_it_is_written_as_a_png(tmp_path: Path) -> None:
    compare.draw_comparison(RESULTS, "utility", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_without_an_ending_gets_one_and_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    written = compare.draw_comparison(RESULTS, "utility", tmp_path / "folder")
    assert written == tmp_path / "folder.png"
    assert written.is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [("picture.pdf", "name a file that ends in .png"), ("file/picture.png", "is a file; name another folder")],
)
def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        compare.draw_comparison(RESULTS, "utility", tmp_path / name)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="against 'utilities'; did you mean 'utility'"):
        compare.draw_comparison(RESULTS, "utilities", tmp_path / "picture.png")
    with pytest.raises(DataError, match="base has no kl"):
        compare.draw_comparison(RESULTS, "kl", tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
