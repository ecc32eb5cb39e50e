"""What every store does, and what none may lose."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError
from spider_sense.extraction.stores import Entry, SqliteStore, Store, StoreError, open_store

DAY = 86_400.0
WRITERS = Path(__file__).with_name("writers.py")


def put(state: bytes, standing: str = "") -> Any:
    return lambda old: Entry(state, standing)


def then_set(act: Callable[[], object], done: threading.Event) -> None:
    act()
    done.set()


def divide(old: Entry | None) -> Entry:
    raise ZeroDivisionError


def count(state: bytes | None) -> int:
    return int.from_bytes(state[:8]) if state else 0


def plus_one(old: Entry | None) -> Entry:
    return Entry((count(old.state if old else None) + 1).to_bytes(8))


def test_what_is_put_is_read(store: Store) -> None:
    assert store.read("ann") is None
    assert len(store) == 0
    kept = store.update({"ann": put(b"\x00\xff state"), "Zoë 猫": put(b"")})
    assert kept == {"ann": Entry(b"\x00\xff state"), "Zoë 猫": Entry(b"")}
    assert (store.read("ann"), store.read("Zoë 猫")) == (b"\x00\xff state", b"")
    assert dict(store.principals()) == {"ann": b"\x00\xff state", "Zoë 猫": b""}
    assert len(store) == 2


def test_a_change_is_handed_the_state_of_before(store: Store) -> None:
    seen = []

    def change(old: Entry | None) -> Entry:
        seen.append(old)
        return Entry(b"next", "watch")

    store.update({"ann": change})
    store.update({"ann": change})
    assert seen == [None, Entry(b"next", "watch")]


def test_it_is_there_for_whoever_opens_it_next(store: Store, place: str) -> None:
    store.update({"ann": put(b"1", "limit")})
    store.link(["ann", "bob"])
    other = open_store(place)
    assert other.read("ann") == b"1"
    assert dict(other.standings()) == {"ann": "limit"}
    assert other.linked("bob") == {"ann", "bob"}
    other.close()
    other.close()


def test_a_change_that_raises_changes_nothing(store: Store) -> None:
    store.update({"ann": put(b"1")})
    with pytest.raises(ZeroDivisionError):
        store.update({"ann": put(b"2"), "bob": divide})
    assert dict(store.principals()) == {"ann": b"1"}
    assert store.update({"ann": plus_one})["ann"]


def test_nothing_to_change(store: Store) -> None:
    assert store.update({}) == {}
    assert store.erase([]) == 0
    store.link([])
    assert list(store.links()) == []


@pytest.mark.parametrize("name", ["", "x" * 513, "ä" * 257, "a\0b", "\udc80"])
def test_names_that_cannot_be_kept(store: Store, name: str) -> None:
    many: list[Callable[[str], object]] = [lambda name: store.link([name]), lambda name: store.unlink([name])]
    for act in (store.read, store.linked, lambda name: store.update({name: put(b"")}), *many):
        with pytest.raises(ValueError, match="cannot be a principal's name"):
            act(name)
    assert len(store) == 0


def test_the_longest_name_and_a_large_state(store: Store) -> None:
    name, state = "x" * 512, os.urandom(1 << 20)
    store.update({name: put(state)})
    assert dict(store.principals()) == {name: state}


def test_standings_are_those_of_a_principal_and_of_its_group(store: Store) -> None:
    store.update({"ann": put(b"1", "watch"), "bob": put(b"1"), "cid": put(b"1", "act"), "dan": put(b"1")})
    store.mark_groups({"bob": "limit", "cid": "watch", "dan": ""})
    assert Counter(store.standings()) == Counter([("ann", "watch"), ("cid", "act"), ("bob", "limit"), ("cid", "watch")])
    store.update({"ann": put(b"2")})
    store.mark_groups({"ann": "limit"})
    assert Counter(store.standings()) == Counter([("cid", "act"), ("ann", "limit")])
    store.mark_groups({})
    assert list(store.standings()) == [("cid", "act")]


def test_what_is_cleared_stays_clear(store: Store) -> None:
    store.update({"ann": put(b"1", "act"), "bob": put(b"1", "watch"), "cid": put(b"1"), "dan": put(b"1")})
    store.mark_groups({"ann": "limit", "dan": "limit"})
    assert store.clear(["ann", "dan", "cid", "nobody"]) == 2
    assert dict(store.standings()) == {"bob": "watch"}
    handed = []
    store.update({"ann": lambda old: handed.append(old) or Entry(b"2")})  # type: ignore[func-returns-value]
    assert handed == [Entry(b"1", "")]
    assert store.clear(["ann"]) == 0


def test_a_writer_does_not_bring_back_what_was_cleared(store: Store, place: str) -> None:
    store.update({"ann": put(b"1", "act")})
    other, done, handed = open_store(place, 30.0), threading.Event(), []
    clearer = threading.Thread(target=then_set, args=(lambda: other.clear(["ann"]), done))

    def change(old: Entry | None) -> Entry:
        handed.append(old)
        if len(handed) == 1:
            clearer.start()
            done.wait(0.5)
        assert old is not None
        return Entry(b"2", old.standing)

    store.update({"ann": change})
    clearer.join()
    assert dict(store.standings()) == {}
    assert store.read("ann") == b"2"
    other.close()


def test_states_of_another_maker_are_refused(store: Store, place: str) -> None:
    store.claim("guard one")
    store.claim("guard one")
    other = open_store(place)
    with pytest.raises(StoreError, match=r"made by guard one, not by guard two.*begin a new store"):
        other.claim("guard two")
    other.claim("guard one")
    other.close()


def test_links_join_what_was_linked_before(store: Store) -> None:
    store.link(["a", "b"])
    store.link(["c", "d"])
    store.link(["x", "y"])
    assert store.linked("a") == {"a", "b"}
    store.link(["b", "c", "new"])
    assert store.linked("a") == {"a", "b", "c", "d", "new"}
    assert store.linked("alone") == {"alone"}
    assert {names for _, names in store.links()} == {frozenset("abcd") | {"new"}, frozenset("xy")}


def test_who_is_unlinked_leaves_the_others_linked(store: Store, place: str) -> None:
    store.link(["a", "b", "c"])
    store.link(["x", "y"])
    assert store.unlink(["b", "alone"]) == 1
    assert store.linked("a") == {"a", "c"}
    assert store.linked("b") == {"b"}
    other = open_store(place)
    assert other.unlink(["x", "x"]) == 1
    other.close()
    assert {names for _, names in store.links()} == {frozenset("ac")}
    assert store.unlink([]) == store.unlink(["b"]) == 0
    store.link(["b", "y"])
    assert store.linked("b") == {"b", "y"}


def test_a_link_keeps_its_name_and_who_left_it_takes_another(store: Store) -> None:
    """States hold what they were linked as, so a name that came back would join those whom it joined before."""
    store.link(["ann", "bob", "cid"])
    ((name, _),) = store.links()
    store.link(["bob", "dan"])
    assert list(store.links()) == [(name, frozenset({"ann", "bob", "cid", "dan"}))]
    store.unlink(["ann"])
    store.erase(["bob"])
    store.link(["ann", "bob"])
    links = {names: link for link, names in store.links()}
    assert links[frozenset({"cid", "dan"})] == name
    assert links[frozenset({"ann", "bob"})] != name
    first = min(links.values())
    store.link(["dan", "ann"])
    assert list(store.links()) == [(first, frozenset({"ann", "bob", "cid", "dan"}))]


def test_a_store_that_is_not_there_is_made_only_where_it_may_be(place: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store of principals; name the one that a server keeps"):
        open_store(place, make=False)
    assert list(tmp_path.iterdir()) == []
    open_store(place).close()
    again = open_store(place, make=False)
    assert len(again) == 0
    again.close()


def test_those_who_were_linked_by_an_erased_one_stay_linked(store: Store) -> None:
    store.link(["a", "b"])
    store.link(["b", "c"])
    store.erase(["b"])
    assert store.linked("a") == {"a", "c"}
    assert store.linked("b") == {"b"}


def test_an_erased_principal_begins_anew(store: Store) -> None:
    store.update({"ann": put(b"old", "act"), "bob": put(b"kept", "act")})
    store.mark_groups({"ann": "limit"})
    assert store.erase(["ann", "nobody"]) == 1
    assert store.read("ann") is None
    assert dict(store.standings()) == {"bob": "act"}
    assert dict(store.principals()) == {"bob": b"kept"}
    assert store.erase(["ann"]) == 0
    assert count(store.update({"ann": plus_one})["ann"].state) == 1


def test_a_review_says_nothing_of_those_who_were_erased_meanwhile(store: Store) -> None:
    store.update({"ann": put(b"1"), "bob": put(b"1")})
    reviewed = dict(store.principals())
    store.erase(["ann"])
    store.mark_groups(dict.fromkeys(reviewed, "limit"))
    assert dict(store.standings()) == {"bob": "limit"}
    store.mark_groups({f"nobody {number}": "limit" for number in range(3000)})
    assert dict(store.standings()) == {}


def test_one_that_is_erased_while_it_is_changed_stays_erased(store: Store, place: str) -> None:
    """A writer that read the state before must not bring it back."""
    store.update({"ann": put(b"secret past")})
    handed: list[Entry | None] = []
    other, done = open_store(place, 30.0), threading.Event()
    eraser = threading.Thread(target=then_set, args=(lambda: other.erase(["ann"]), done))

    def change(old: Entry | None) -> Entry:
        handed.append(old)
        if len(handed) == 1:
            eraser.start()
            done.wait(0.5)
        return Entry((old.state if old else b"") + b"!")

    store.update({"ann": change})
    eraser.join()
    assert store.read("ann") in (None, b"!")
    other.close()


def test_expiry_erases_those_not_seen_since(store: Store) -> None:
    store.update({"old": put(b"1", "act"), "also old": put(b"1")}, seen=1000.0)
    store.update({"new": put(b"1")}, seen=2000.0)
    store.update({"back": put(b"1")}, seen=1000.0)
    store.update({"back": put(b"2")}, seen=2000.5)
    assert store.expire(2000.0) == 2
    assert dict(store.principals()) == {"new": b"1", "back": b"2"}
    assert list(store.standings()) == []
    assert store.expire(2000.0) == 0


def test_a_late_event_makes_nobody_older(store: Store) -> None:
    store.update({"ann": put(b"1")}, seen=2000.0)
    store.update({"ann": put(b"2")}, seen=1000.0)
    assert store.expire(1500.0) == 0


def test_now_is_when_one_was_seen(store: Store) -> None:
    store.update({"ann": put(b"1")})
    assert store.expire(time.time() - 60) == 0
    assert store.expire(time.time() + 60) == 1


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Return a function that sets the clock some days ahead, and returns when 90 days before that was."""
    now = time.time()

    def clock(days: float) -> float:
        ahead = now + days * DAY
        monkeypatch.setattr("spider_sense.extraction.stores.store.time", SimpleNamespace(time=lambda: ahead))
        return ahead - 90 * DAY

    return clock


def test_who_was_seen_under_a_clock_that_was_ahead_ages_from_when_it_is_right(
    store: Store, at: Callable[[float], float]
) -> None:
    at(3650)
    store.update({"ann": put(b"1"), "bob": put(b"1")})
    before = at(0)
    store.update({"ann": put(b"2")})
    assert store.expire(before) == 0
    for day in range(25, 90, 25):
        assert store.expire(at(day)) == 0
    assert store.expire(at(91)) == 2


def test_a_clock_that_is_ahead_erases_nobody(store: Store, at: Callable[[float], float]) -> None:
    store.update({"ann": put(b"1")})
    assert store.expire(at(1)) == 0
    before = at(92)
    for _ in range(2):  # A request under the wrong clock is no sign that it is right.
        with pytest.raises(StoreError, match=r"91 days after the last expiry.*`spider-sense principals expire`"):
            store.expire(before)
        store.update({"bob": put(b"1")})
    assert store.read("ann") == b"1"
    assert store.expire(at(2)) == 0
    with pytest.raises(StoreError, match="42 days before the last expiry"):
        store.expire(at(-40))


def test_who_vouches_for_the_clock_erases_after_a_long_pause(store: Store, at: Callable[[float], float]) -> None:
    store.update({"ann": put(b"1")})
    before = at(180)
    store.update({"bob": put(b"1")})
    assert store.expire(before, sure=True) == 1
    assert store.expire(at(181)) == 0
    assert store.read("bob") == b"1"


def test_a_store_of_before_goes_on_from_whoever_was_seen_last(
    place: str, store: Store, at: Callable[[float], float]
) -> None:
    store.update({"ann": put(b"1")}, seen=time.time() - 40 * DAY)
    forget_expiry(store)
    reopened = open_store(place)
    with pytest.raises(StoreError, match="40 days after the last expiry"):
        reopened.expire(at(0))
    reopened.close()


def forget_expiry(store: Any) -> None:
    if isinstance(store, SqliteStore):
        store._db.execute("DROP TABLE expiry")
    else:
        store._db.delete("{spider-sense}:expired")


def test_threads_lose_no_update(store: Store) -> None:
    def work() -> None:
        for _ in range(25):
            store.update({"ann": plus_one, "bob": plus_one})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [count(store.read(name)) for name in ("ann", "bob")] == [100, 100]


def test_processes_lose_no_update(place: str) -> None:
    """They also open it all at once, before it is there."""
    updates = 60
    workers = [subprocess.Popen([sys.executable, WRITERS, "add", place, str(updates)]) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0, 0, 0, 0]
    store = open_store(place)
    assert sum(count(store.read(name)) for name in ("ann", "bob", "cid")) == 4 * updates * 2
    store.close()


def test_a_killed_writer_loses_nothing_that_was_acknowledged(place: str) -> None:
    for seed in range(3):
        worker = subprocess.Popen(
            [sys.executable, WRITERS, "load", place, str(seed)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        lines = [worker.stdout.readline() for _ in range(300)]
        time.sleep(0.05 * seed)
        worker.send_signal(signal.SIGKILL)
        rest, _ = worker.communicate()
        # The last line may be cut short.
        told = [line.split() for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]
        acknowledged = {name: int(number) for name, number in told}
        assert acknowledged
        store = open_store(place)
        found = {name: count(state) for name, state in store.principals()}
        store.close()
        assert all(found[name] >= number for name, number in acknowledged.items())
        assert sum(found.values()) <= sum(acknowledged.values()) + sum(found[n] for n in found if n[0] != str(seed)) + 8


def test_a_hundred_thousand_principals(store: Store) -> None:
    names = [f"principal {number}" for number in range(100_000)]
    for start in range(0, len(names), 5000):
        store.update({name: put(name.encode() * 4) for name in names[start : start + 5000]}, seen=float(start))
    assert len(store) == 100_000
    assert sum(state == name.encode() * 4 for name, state in store.principals()) == 100_000
    assert store.read("principal 77777") == b"principal 77777" * 4
    assert store.expire(50_000.0) == 50_000
    assert len(store) == 50_000


@pytest.mark.parametrize("place", ["mysql://here", "https://x", "://"])
def test_places_that_are_no_store(place: str) -> None:
    with pytest.raises(ConfigError, match="names no store"):
        open_store(place)


def test_the_error_of_a_store_says_what_is_kept(store: Store) -> None:
    assert StoreError("broken").committed == frozenset()
    assert StoreError("broken", ["a"]).committed == {"a"}
