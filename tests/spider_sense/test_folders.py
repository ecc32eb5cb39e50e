"""What is said before long work of an output that cannot be written."""

import os
from pathlib import Path

import pytest

from spider_sense.errors import ConfigError
from spider_sense.folders import check_file, check_writable


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this user may not write into; the superuser may write everywhere, so permissions are feigned."""
    folder, access = tmp_path / "closed", os.access
    folder.mkdir()
    (folder / "there.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    return folder


def test_a_closed_folder_is_named(closed: Path) -> None:
    with pytest.raises(ConfigError, match=r"new: .*closed is closed to this user; name another folder"):
        check_writable(closed / "new")
    for name in ("there.json", "new.json"):
        with pytest.raises(ConfigError, match="closed is closed to this user"):
            check_file(closed / name)


def test_a_file_that_is_written_in_place_needs_no_open_folder(closed: Path, tmp_path: Path) -> None:
    check_file(closed / "there.json", renamed=False)
    with pytest.raises(ConfigError, match="closed is closed to this user"):
        check_file(closed / "new.json", renamed=False)
    check_file(tmp_path / "new.json")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file is a file; name another folder"):
        check_writable(file / "out")
    with pytest.raises(ConfigError, match=r"it is a folder; name a file with --out"):
        check_file(tmp_path)
    with pytest.raises(ConfigError, match=r"missing does not exist; make it, or name another file with --out"):
        check_file(tmp_path / "missing" / "file")
