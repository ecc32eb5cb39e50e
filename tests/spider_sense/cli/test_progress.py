"""What a log shows of long work: a line with its first step, one a minute, and one when it is done."""

from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress

from spider_sense.cli.progress import Lines, progress_bars


@pytest.fixture
def shown() -> Lines:
    return Lines(console=Console(file=StringIO()), transient=True)


def test_a_task_has_a_line_with_its_first_step_and_when_it_is_done(
    shown: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown:
        task = shown.add_task("Reading", total=1500)
        for _ in range(1500):
            shown.advance(task)
        shown.advance(task)
        open_end = shown.add_task("Sweeping", total=None)
        shown.advance(open_end, 7)
        shown.update(open_end, total=9, completed=9)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "Reading: 1 of 1,500, 0 s",
        "Reading: 1,500 of 1,500, 0 s",
        "Sweeping: 7, 0 s",
        "Sweeping: 9 of 9, 0 s",
    ]


def test_a_task_that_takes_long_has_a_line_a_minute(
    shown: Lines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    task = shown.add_task("Reading", total=1000)
    for now[0] in (30.0, 59.0, 61.0, 90.0, 120.0, 150.0):
        shown.advance(task)
    lines_of = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines_of == ["Reading: 1 of 1", "Reading: 4 of 1", "Reading: 6 of 1"]


def test_one_bar_shows_one_task_after_another(shown: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    bar = shown.add_task("base", total=None)
    for step in range(3):
        shown.update(bar, description=f"tuning: loss {3 - step}", completed=step + 1, total=3)
    shown.update(bar, description="measuring", total=None)
    for part in ("harmful", "benign"):
        shown.update(bar, description=part, completed=3, total=3)
    for done in (1, 2, 3):
        shown.update(bar, description="borderline", completed=done, total=3)
    lines_of = [line.rpartition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines_of == [
        "tuning: loss 3: 1 of 3",
        "tuning: loss 1: 3 of 3",
        "measuring: 3 of 3",
        "harmful: 3 of 3",
        "benign: 3 of 3",
        "borderline: 1 of 3",
        "borderline: 3 of 3",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_are_written_where_stderr_is_no_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert type(progress_bars()) is (Progress if terminal else Lines)
