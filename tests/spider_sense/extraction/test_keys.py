"""Keyed hashes."""

from pathlib import Path

import pytest

from spider_sense.errors import ConfigError
from spider_sense.extraction import Key

KEY = Key(b"sixteen bytes at least")


def test_hashes_depend_on_key_kind_and_text() -> None:
    assert KEY.hash("payment", "card") == Key(b"sixteen bytes at least").hash("payment", "card") > 0
    assert len({KEY.hash("payment", "card"), KEY.hash("network", "card"), KEY.hash("payment", "cord")}) == 3
    assert KEY.hash("payment", "card") != Key(b"another sixteen bytes").hash("payment", "card")
    assert KEY.digest != Key(b"another sixteen bytes").digest


def test_filled_templates_share_their_opening() -> None:
    one = KEY.opening('Solve problem 17 and show every step: "what is 2 + 3?" Answer as JSON with one key, please.')
    other = KEY.opening('solve problem 4 and show every step: "name 9 rivers" Answer as JSON with one key, please.')
    assert one == other
    assert KEY.opening("How do I poach an egg?") != one
    assert KEY.opening("  ...  ") == 0
    assert KEY.parameters({"a": 1, "b": 2}) == KEY.parameters({"b": 2, "a": 1})
    assert KEY.parameters({"a": 1, "b": 0.5}) == KEY.parameters({"a": 1.0, "b": 0.5}) != KEY.parameters({"a": 1})
    assert KEY.parameters({}) == 0


def test_a_key_is_made_once_and_read_again(tmp_path: Path) -> None:
    made = Key.create(tmp_path / "key")
    assert Key.read(tmp_path / "key").digest == made.digest
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="name a new file"):
        Key.create(tmp_path / "key")


def test_nobody_else_can_open_a_key_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []

    def drawn(size: int) -> bytes:
        modes.append((tmp_path / "key").stat().st_mode & 0o077)
        return bytes(size)

    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    monkeypatch.setattr("spider_sense.extraction.keys.secrets.token_bytes", drawn)
    Key.create(tmp_path / "key")
    assert modes == [0]


def test_a_short_or_missing_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 bytes"):
        Key(b"short")
    with pytest.raises(ConfigError, match="cannot read"):
        Key.read(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty: the key has 0 bytes; write at least 16 random ones"):
        Key.read(tmp_path / "empty")
