"""The file: what it is, what is left in it, and files that are none."""

import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from spider_sense.extraction.stores import Entry, SqliteStore, StoreError

MARK = b"\xc3what nobody may find again"


def marked(size: int, old: Entry | None) -> Entry:
    return Entry(MARK * size, "act")


def files(path: Path) -> bytes:
    """Return all bytes of the file, its log and its index."""
    return b"".join(each.read_bytes() for each in sorted(path.parent.glob(path.name + "*")))


def test_an_erased_principal_is_in_no_file(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with_others = SqliteStore(path)
    for number in range(200):
        with_others.update({f"other {number}": lambda old: Entry(bytes(5000))})
    for size in (1, 40, 400):  # it grows and shrinks, and moves to other pages
        with_others.update({"ann@example.org": partial(marked, size)})
    with_others.update({"ann@example.org": lambda old: Entry(MARK, "act")})
    with_others.mark_groups({"ann@example.org": "limit"})
    with_others.link(["ann@example.org", "other 1"])
    assert MARK in files(path)
    assert with_others.erase(["ann@example.org"]) == 1
    assert MARK not in files(path)
    assert b"ann@example.org" not in files(path)
    with_others.close()
    assert MARK not in files(path)


def test_expiry_leaves_nothing_in_the_file(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store")
    store.update({"ann": lambda old: Entry(MARK)}, seen=1.0)
    store.expire(2.0)
    assert MARK not in files(tmp_path / "store")
    store.close()


def test_a_reader_that_keeps_the_log_is_told(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store", patience=0.1)
    store.update({"ann": lambda old: Entry(MARK)})
    reader = sqlite3.connect(tmp_path / "store", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM principal").fetchall()
    with pytest.raises(StoreError, match="its log still holds what was erased; erase once more"):
        store.erase(["ann"])
    assert store.read("ann") is None
    reader.close()
    assert store.erase(["ann"]) == 0
    assert MARK not in files(tmp_path / "store")
    store.close()


def test_an_expiry_that_left_its_log_behind_is_made_up_for(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store", patience=0.1)
    store.update({"ann": lambda old: Entry(MARK)}, seen=1.0)
    reader = sqlite3.connect(tmp_path / "store", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM principal").fetchall()
    with pytest.raises(StoreError, match="its log still holds what was erased"):
        store.expire(2.0)
    reader.close()
    assert MARK in files(tmp_path / "store")
    assert store.expire(2.0) == 0
    assert MARK not in files(tmp_path / "store")
    store.close()


def test_every_commit_is_forced_to_the_disk(tmp_path: Path) -> None:
    """Acknowledged is durable: the process syncs its log between the write and what it prints of it."""
    code = (
        "import os, sys; from spider_sense.extraction.stores import *; store = SqliteStore(sys.argv[1]);"
        "os.write(1, b'begin'); store.update({f'p{n}': lambda s: Entry(b'1') for n in range(100)}); os.write(1, b'ack')"
    )
    trace = ["strace", "-f", "-e", "trace=write,fsync,fdatasync", sys.executable, "-c", code, str(tmp_path / "store")]
    try:
        done = subprocess.run(trace, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs strace")
    between = done.stderr.partition('"begin"')[2].partition('"ack"')[0]
    assert between.count("sync(") == 1


def test_it_is_durable_by_its_settings(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store")
    settings = {name: store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert settings == {"journal_mode": "wal", "synchronous": 2}
    store.close()


def test_a_file_that_another_process_holds(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store", patience=0.1)
    holder = sqlite3.connect(tmp_path / "store", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"locked; another process has held the file for 0\.1 s"):
        store.update({"ann": lambda old: Entry(b"1")})
    assert store.read("ann") is None
    holder.close()
    assert store.update({"ann": lambda old: Entry(b"1")})
    store.close()


def test_a_file_of_another_version(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "store").close()
    changed = sqlite3.connect(tmp_path / "store")
    changed.execute("PRAGMA user_version = 7")
    changed.commit()
    changed.close()
    with pytest.raises(StoreError, match="schema version 7, this library reads 1"):
        SqliteStore(tmp_path / "store")


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE cookies (name)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="a database of another program"):
        SqliteStore(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, though long enough to hold a header\n" * 100)
    with pytest.raises(StoreError, match="is no database, or damaged"):
        SqliteStore(tmp_path / "text")


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = SqliteStore(path)
    store.update({f"principal {number}": lambda old: Entry(bytes(3000)) for number in range(200)})
    store.close()
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    damaged = SqliteStore(path)
    with pytest.raises(StoreError, match=r"malformed.*move it away"):
        list(damaged.principals())
    with pytest.raises(StoreError, match="malformed"):
        damaged.update({"new": lambda old: Entry(b"1")})
    damaged.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="make its folder"):
        SqliteStore(tmp_path / "nowhere" / "store")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.read("ann")


def _modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


def test_a_new_store_is_its_owners_alone(tmp_path: Path, open_umask: None) -> None:
    store = SqliteStore(tmp_path / "store")
    store.update({"ann": lambda old: Entry(b"state")})
    assert _modes(tmp_path) == dict.fromkeys(("store", "store-wal", "store-shm"), 0o600)
    store.close()


def test_what_an_operator_has_set_stays(tmp_path: Path, open_umask: None) -> None:
    (tmp_path / "store").touch(mode=0o640)
    store = SqliteStore(tmp_path / "store")
    store.update({"ann": lambda old: Entry(b"state")})
    assert _modes(tmp_path) == dict.fromkeys(("store", "store-wal", "store-shm"), 0o640)
    store.close()


def test_where_a_link_points_nobody_else_reads(tmp_path: Path, open_umask: None) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk" / "store")
    store = SqliteStore(tmp_path / "store")
    store.update({"ann": lambda old: Entry(b"state")})
    assert set(_modes(tmp_path / "disk").values()) == {0o600}
    store.close()
