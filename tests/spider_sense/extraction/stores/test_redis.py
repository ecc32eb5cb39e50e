"""The server: what it must promise, what is left in its files, and when it dies."""

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import MissingExtraError
from spider_sense.extraction.stores import Entry, RedisStore, StoreError

MARK = b"\xc3what nobody may find again"
WRITERS = Path(__file__).with_name("writers.py")


def shout(old: Entry | None) -> Entry:
    return Entry((old.state if old else b"") + b"!")


def marked(size: int, old: Entry | None) -> Entry:
    return Entry(MARK * size, "act")


def files(folder: Path) -> bytes:
    return b"".join(each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file())


def test_an_erased_principal_is_in_no_file(own_server: Any) -> None:
    store = RedisStore(own_server.url)
    for size in (1, 40, 400):
        store.update({"ann@example.org": partial(marked, size)})
    store.mark_groups({"ann@example.org": "limit"})
    store.link(["ann@example.org", "bob"])
    store._db.config_set("save", "3600 1")
    store._db.save()
    assert MARK in files(own_server.folder)
    assert store.erase(["ann@example.org"]) == 1
    assert MARK not in files(own_server.folder)
    assert b"ann@example.org" not in files(own_server.folder)
    store.close()


def test_an_expiry_that_left_its_files_behind_is_made_up_for(own_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore(own_server.url)
    store.update({"ann": partial(marked, 1)}, seen=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_in_background", lambda *_: (_ for _ in ()).throw(StoreError("the disk is full")))
        with pytest.raises(StoreError, match="the disk is full"):
            store.expire(2.0)
    assert MARK in files(own_server.folder)
    assert store.expire(2.0) == 0
    assert MARK not in files(own_server.folder)
    store.close()


@pytest.mark.parametrize(
    ("setting", "bad"), [("appendonly", "no"), ("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")]
)
def test_a_server_that_may_forget_is_refused(own_server: Any, setting: str, bad: str) -> None:
    store = RedisStore(own_server.url)
    store._db.config_set(setting, bad)
    with pytest.raises(StoreError, match=f"runs with {setting} {bad}.*start the server with --{setting}"):
        RedisStore(own_server.url)
    store.close()


def test_a_killed_server_loses_nothing_that_was_acknowledged(own_server: Any) -> None:
    command = [sys.executable, WRITERS, "load", own_server.url, "1"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert worker.stdout is not None
    lines = [worker.stdout.readline() for _ in range(400)]
    own_server.kill()
    time.sleep(0.2)
    worker.kill()
    rest, _ = worker.communicate()
    told = [line.split() for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]
    own_server.start()
    store = RedisStore(own_server.url)
    found = {name: int.from_bytes(state[:8]) for name, state in store.principals()}
    store.close()
    assert all(found[name] >= int(number) for name, number in told)


def test_a_server_that_is_away_for_a_moment(own_server: Any) -> None:
    store = RedisStore(own_server.url, patience=1.0)
    store.update({"ann": lambda old: Entry(b"1")})
    own_server.kill()
    with pytest.raises(StoreError, match="see whether the server runs"):
        store.update({"ann": lambda old: Entry(b"2")})
    own_server.start()
    assert store.read("ann") == b"1"
    store.close()


def test_the_same_command_twice_counts_once(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore(server.url)
    real, calls = store._set, []

    def twice(**options: Any) -> Any:
        calls.append(real(**options))
        return real(**options)

    monkeypatch.setattr(store, "_set", twice)
    store.update({"ann": shout})
    assert store.read("ann") == b"!"
    assert len(calls) == 1
    store.close()


def test_a_writer_that_never_gets_its_turn_gives_up(server: Any) -> None:
    store, other = RedisStore(server.url, patience=0.2), RedisStore(server.url)

    def change(old: Entry | None) -> Entry:
        other.update({"ann": lambda old: Entry(b"other")})
        return Entry(b"mine")

    with pytest.raises(StoreError, match=r"other writers changed 'ann' for 0\.2 s.*1 of 2 changes are kept") as told:
        store.update({"ann": change, "bob": lambda old: Entry(b"mine")})
    assert told.value.committed == {"bob"}
    assert (store.read("ann"), store.read("bob")) == (b"other", b"mine")


def test_many_writers_of_one_principal_all_get_their_turn(server: Any) -> None:
    stores = [RedisStore(server.url) for _ in range(8)]

    def work(store: RedisStore) -> None:
        for _ in range(20):
            store.update({"ann": shout})

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].read("ann") == b"!" * 160


def test_a_server_of_another_version(server: Any) -> None:
    store = RedisStore(server.url)
    store._db.set("{spider-sense}:schema", "9")
    with pytest.raises(StoreError, match="schema version 9, this library reads 1"):
        RedisStore(server.url)
    store.close()


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="see whether the server runs"):
        RedisStore(f"unix://{tmp_path}/socket", patience=0.2)


@pytest.mark.parametrize("url", ["redis://:hunter2@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=hunter2"])
def test_a_password_is_not_told(url: str) -> None:
    with pytest.raises(StoreError, match="127") as told:
        RedisStore(url, patience=0.2)
    assert "hunter2" not in str(told.value)


def test_a_url_that_cannot_be_read() -> None:
    with pytest.raises(StoreError, match="write redis://HOST:6379/0"):
        RedisStore("redis://127.0.0.1:no/0")


def test_without_redis_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"'\.\[redis\]"):
        RedisStore("redis://127.0.0.1")
