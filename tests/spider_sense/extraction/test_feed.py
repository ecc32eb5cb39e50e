"""The feed: nothing waits for it, nothing is lost in silence, and it says when it does not know."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import StateError
from spider_sense.extraction import PrincipalState
from spider_sense.extraction.feed import Feed
from spider_sense.extraction.standing import decision_of, text_of
from spider_sense.extraction.stores import Change, Entry, Store, StoreError, open_store


class Flaky:
    """A store that fails while it is told to, and may be held up."""

    def __init__(self, real: Store) -> None:
        self._real = real
        self.broken = False
        self.commits_first = False
        self.go = threading.Event()
        self.go.set()
        self.updates = 0

    def update(self, changes: Mapping[str, Change], seen: float | None = None) -> dict[str, Entry]:
        self.go.wait(10)
        if self.broken and self.commits_first:
            first = next(iter(changes))
            self._real.update({first: changes[first]})
            self.broken = False
            raise StoreError("half of it", [first])
        if self.broken:
            raise StoreError("the disk is gone")
        self.updates += 1
        return self._real.update(changes, seen)

    def standings(self) -> Any:
        if self.broken:
            raise StoreError("the disk is gone")
        return self._real.standings()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count(store: Store, name: str) -> int:
    data = store.read(name)
    return 0 if data is None else PrincipalState.from_bytes(data).count


def test_what_is_decided_is_found_by_the_next_request(feed: Any, helpers: Any) -> None:
    one = feed()
    assert one.standing("ann").level == "clear"
    levels = []
    for _ in range(6):
        one.offer(helpers.seen("ann"))
        assert one.flush()
        levels.append(one.standing("ann").level)
    assert levels == ["watch", "watch", "limit", "limit", "act", "act"]
    assert one.standing("ann").reason == "own: its requests changed"
    assert one.standing("bob").level == "clear"


def test_what_was_decided_stays_in_the_store(feed: Any, store: Store, helpers: Any) -> None:
    one = feed()
    for _ in range(4):
        one.offer(helpers.seen("ann"))
        assert one.flush()
    assert [(name, decision_of(text).level) for name, text in store.standings()] == [("ann", "limit")]


def test_what_is_kept_of_one_principal_names_no_other(helpers: Any) -> None:
    found = helpers.decision("ann", "limit", "group")
    assert found.group
    assert decision_of(text_of(found)) == replace(found, group=())


def test_many_requests_share_a_commit(feed: Any, store: Store, helpers: Any) -> None:
    flaky = Flaky(store)
    flaky.go.clear()
    one = feed(flaky, batch=1000)
    for number in range(500):
        one.offer(helpers.seen(f"p{number % 50}"))
    flaky.go.set()
    assert one.flush()
    assert one.counts.totals == {"folded": 500}
    assert flaky.updates <= 3
    assert [count(store, f"p{number}") for number in range(50)] == [10] * 50


def test_a_new_feed_knows_what_was_found_before(feed: Any, store: Store, tmp_path: Path, helpers: Any) -> None:
    store.update(
        {"ann": lambda old: Entry(b"", text_of(helpers.decision("ann", "act"))), "bob": lambda old: Entry(b"")}
    )
    store.mark_groups({"bob": text_of(helpers.decision("bob", "limit", "group"))})
    one = feed()
    assert one.standing("ann").level == "act"
    assert one.standing("bob").level == "limit"
    assert one.standing("bob").reason.startswith("group: ")


def test_what_others_write_arrives(feed: Any, store: Store, tmp_path: Path, helpers: Any) -> None:
    one, other = feed(), open_store(str(tmp_path / "principals.sqlite"))
    one.offer(helpers.seen("ann"))
    one.flush()
    other.mark_groups({"ann": text_of(helpers.decision("ann", "act", "group"))})
    wait_until(lambda: one.standing("ann").level == "act")
    other.mark_groups({})
    wait_until(lambda: one.standing("ann").level == "watch")
    other.erase(["ann"])
    wait_until(lambda: one.standing("ann").level == "clear")
    other.close()


def test_two_feeds_of_one_store_count_together(feed: Any, store: Store, tmp_path: Path, helpers: Any) -> None:
    here, there = feed(), feed(open_store(str(tmp_path / "principals.sqlite")))
    for each in (here, there, here, there):
        for _ in range(25):
            each.offer(helpers.seen("ann"))
    assert here.flush()
    assert there.flush()
    assert count(store, "ann") == 100


def test_a_full_queue_drops_and_says_so(feed: Any, store: Store, helpers: Any) -> None:
    flaky = Flaky(store)
    flaky.go.clear()
    one = feed(flaky, queue=5, batch=2)
    started = time.monotonic()
    for _ in range(100):
        one.offer(helpers.seen("ann"))
    one.offer(helpers.seen("bob"))
    assert time.monotonic() - started < 1
    assert one.standing("ann").level == one.standing("bob").level == "unknown"
    assert "lost" in one.standing("bob").reason
    flaky.go.set()
    assert one.flush()
    totals = one.counts.totals
    assert totals["folded"] + totals["dropped"] == 101
    assert totals["dropped"] >= 90
    assert count(store, "ann") == totals["folded"]
    # What was folded had waited since before the last one was dropped.
    assert one.standing("bob").level == "unknown"
    assert one.standing("ann").level == "act", "no loss hides that"
    for name in ("ann", "bob"):
        one.offer(helpers.seen(name))
    one.flush()
    assert one.standing("ann").level == "act"
    assert one.standing("bob").level == "watch"


def test_a_store_that_fails_is_tried_again(feed: Any, store: Store, helpers: Any) -> None:
    flaky = Flaky(store)
    one = feed(flaky)
    flaky.broken = True
    one.offer(helpers.seen("ann"))
    wait_until(lambda: one.standing("nobody").level == "unknown")
    assert "the disk is gone" in one.standing("nobody").reason
    flaky.broken = False
    assert one.flush()
    assert one.standing("nobody").level == "clear"
    assert count(store, "ann") == 1
    assert one.counts.totals["folded"] == 1
    assert one.counts.totals["store_errors"] >= 1


def test_a_store_that_fails_while_nobody_asks_is_noticed(feed: Any, store: Store) -> None:
    flaky = Flaky(store)
    one = feed(flaky)
    flaky.broken = True
    wait_until(lambda: one.standing("ann").level == "unknown")
    flaky.broken = False
    wait_until(lambda: one.standing("ann").level == "clear")


def test_what_a_failing_store_has_committed_is_not_folded_twice(feed: Any, store: Store, helpers: Any) -> None:
    flaky = Flaky(store)
    flaky.go.clear()
    one = feed(flaky)
    for name in ("ann", "bob"):
        one.offer(helpers.seen(name))
    flaky.broken = flaky.commits_first = True
    time.sleep(0.1)
    flaky.go.set()
    assert one.flush()
    assert [count(store, name) for name in ("ann", "bob")] == [1, 1]
    assert one.counts.totals["folded"] == 2
    assert one.standing("ann").level == one.standing("bob").level == "watch"


def test_only_a_later_request_makes_up_for_one_that_was_lost(feed: Any, store: Store, helpers: Any) -> None:
    flaky = Flaky(store)
    flaky.go.clear()
    unreadable = replace(helpers.seen("ann"), prompt=())
    one = feed(flaky)
    for seen in (unreadable, helpers.seen("ann"), replace(unreadable, principal="bob"), helpers.seen("cid")):
        one.offer(seen)
    one.offer(helpers.seen("dan"))
    one.offer(replace(unreadable, principal="dan"))
    flaky.go.set()
    assert one.flush()
    levels = {name: one.standing(name).level for name in ("ann", "bob", "cid", "dan")}
    assert levels == {"ann": "watch", "bob": "unknown", "cid": "watch", "dan": "unknown"}


def test_a_principal_that_cannot_be_folded_makes_nobody_count_twice(feed: Any, store: Store, helpers: Any) -> None:
    """A store that writes part by part has committed one part when the change of another one raises."""

    class Parted(Flaky):
        def update(self, changes: Mapping[str, Change], seen: float | None = None) -> dict[str, Entry]:
            self.go.wait(10)
            kept: dict[str, Entry] = {}
            for name, change in changes.items():
                try:
                    kept |= self._real.update({name: change}, seen)
                except ZeroDivisionError as error:
                    if kept:
                        raise StoreError("half of it", kept) from error
                    raise
            return kept

    parted = Parted(store)
    parted.go.clear()
    one = feed(parted)
    for name in ("ann", "breaks the detector", "bob"):
        one.offer(helpers.seen(name))
    parted.go.set()
    assert one.flush()
    assert [count(store, name) for name in ("ann", "bob")] == [1, 1]
    assert (one.counts.totals["folded"], one.counts.totals["failed"]) == (2, 1)


@pytest.mark.parametrize("name", ["breaks the detector", "cannot be read", "", "x" * 600])
def test_one_principal_that_cannot_be_folded_leaves_others_alone(
    feed: Any, store: Store, helpers: Any, name: str
) -> None:
    flaky = Flaky(store)
    flaky.go.clear()
    one = feed(flaky)
    for principal in ("ann", name, "bob", name):
        one.offer(helpers.seen(principal))
    flaky.go.set()
    assert one.flush()
    assert [count(store, principal) for principal in ("ann", "bob")] == [1, 1]
    assert (one.counts.totals["folded"], one.counts.totals["failed"]) == (2, 2)
    assert one.standing(name).level == "unknown"
    assert one.standing("ann").level == "watch"


def test_a_damaged_state_fails_closed(feed: Any, store: Store, helpers: Any) -> None:
    store.update({"ann": lambda old: Entry(b"damaged")})
    one = feed()
    one.offer(helpers.seen("ann"))
    assert one.flush()
    assert one.standing("ann").level == "unknown"
    assert store.read("ann") == b"damaged"


def damaged(**changed: object) -> str:
    """Return the standing of somebody who is watched, with fields that no store kept."""
    whole = {"principal": "ann", "level": "watch", "tier": "own", "score": 9.0, "threshold": 4.0, "p_value": 0.001}
    rest = {"count": 1, "time": 1000.0, "stratum": "", "certified": True, "evidence": ["it changed"], "group": []}
    return json.dumps(whole | rest | changed)


def test_what_is_damaged_below_was_whole() -> None:
    assert decision_of(damaged()).evidence == ("it changed",)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '"act"', '{"level": "act"}', "damaged", damaged(level=3), damaged(level="ban")),
        *(damaged(evidence=5), damaged(evidence=["it changed", 3]), damaged(time="noon"), damaged(tier="fourth")),
    ],
)
def test_a_damaged_standing_is_one_principals_own(feed: Any, store: Store, helpers: Any, text: str) -> None:
    state = helpers.Counting().open("ann").to_bytes()
    store.update({"ann": lambda old: Entry(state, text), "bob": lambda old: Entry(state)})
    store.mark_groups({"bob": text_of(helpers.decision("bob", "limit", "group")), "ann": text})
    one = feed()
    for _ in range(2):
        assert [one.standing(name).level for name in ("ann", "bob", "cid")] == ["unknown", "limit", "clear"]
        for name in ("ann", "bob"):
            one.offer(helpers.seen(name))
        assert one.flush()
    assert one.counts.totals["store_errors"] == 0
    store.clear(["ann"])
    one.offer(helpers.seen("ann"))
    wait_until(lambda: one.standing("ann").level == "watch")


def test_a_damaged_standing_says_what_is_wrong(helpers: Any) -> None:
    text = text_of(helpers.decision("ann", "act")).replace('"act"', '"ban"')
    with pytest.raises(StateError, match=r"level: Input should be 'watch', 'limit' or 'act'.*clear its principal"):
        decision_of(text)


def test_one_who_is_acted_on_is_so_whatever_else_is_missing(feed: Any, store: Store, helpers: Any) -> None:
    state = helpers.Counting().open("ann").to_bytes()
    ann, bob = (Entry(state, text_of(helpers.decision(*who))) for who in (("ann", "act"), ("bob", "limit")))
    store.update({"ann": lambda old: ann, "bob": lambda old: bob})
    store.mark_groups({"ann": "damaged", "bob": "damaged"})
    assert [feed().standing(name).level for name in ("ann", "bob")] == ["act", "unknown"]


def test_losses_are_remembered_of_the_latest_alone(
    feed: Any, store: Store, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sense.extraction.losses._REMEMBERED", 3)
    one = feed()
    for name in ("a", "b", "c", "a", "d", "e"):
        one.offer(replace(helpers.seen(name), prompt=()))
    assert one.flush()
    assert [name for name in "abcde" if one.standing(name).level == "unknown"] == ["a", "d", "e"]
    assert one.counts.totals["failed"] == 6


def test_declared_links_are_evidence(feed: Any, store: Store, helpers: Any) -> None:
    detector = helpers.Counting()
    one = feed(detector=detector, linked=(("bob", "ann"), ("cid", "bob")))
    for name in ("ann", "bob", "cid", "dan"):
        one.offer(helpers.seen(name))
    assert one.flush()
    links = {event.principal: event.links for event in detector.events}
    ((link, _),) = store.links()
    assert links["ann"] == links["bob"] == links["cid"] == (("declared", helpers.KEY.hash("declared", link)),)
    assert links["dan"] == ()


def test_closing_folds_what_waits(feed: Any, tmp_path: Path, helpers: Any) -> None:
    one: Feed = feed(batch=7)
    for _ in range(50):
        one.offer(helpers.seen("ann"))
    one.close()
    one.close()
    assert one.standing("ann").level == "unknown"
    again = open_store(str(tmp_path / "principals.sqlite"))
    assert count(again, "ann") == 50
    again.close()


def test_closing_while_the_store_fails_counts_what_is_lost(
    feed: Any, store: Store, helpers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky(store)
    one = feed(flaky)
    flaky.broken = True
    one.offer(helpers.seen("ann"))
    one.close(0.3)
    assert one.counts.totals["failed"] == 1
    assert "1 requests were not folded before the feed closed" in caplog.text


def test_a_note_tells_what_is_new(feed: Any, helpers: Any) -> None:
    one = feed()
    assert one.counts.take() is None
    for _ in range(3):
        one.offer(helpers.seen("ann"))
    one.flush()
    note = one.counts.take()
    assert note["requests"] == {"folded": 3}
    assert note["decisions"] == [("watch", "own"), ("limit", "own")]
    assert len(note["seconds"]) == 3
    assert all(0 <= seconds < 10 for seconds in note["seconds"])
    assert (note["store_errors"], note["waiting"]) == (0, 0)
    assert one.counts.take() is None


def test_retention(feed: Any, store: Store, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spider_sense.extraction.feed._HOUR", 0.05)
    store.update({"old": lambda old: Entry(b"")}, seen=time.time() - 10)
    feed(retention_days=1.0)
    wait_until(lambda: store.read("old") is None)


def test_a_server_that_is_often_started_anew_erases_too(feed: Any, store: Store) -> None:
    store.update({"old": lambda old: Entry(b"")}, seen=time.time() - 2 * 86_400)
    feed(retention_days=1.0)
    wait_until(lambda: store.read("old") is None)


def test_an_erasure_that_fails_stops_nobody(
    feed: Any, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def expire(before: float) -> int:
        raise StoreError("another process reads the file")

    flaky = Flaky(store)
    flaky.expire = expire  # type: ignore[attr-defined]
    monkeypatch.setattr("spider_sense.extraction.feed._HOUR", 0.01)
    one = feed(flaky)
    wait_until(lambda: one.counts.totals["store_errors"] > 1)
    assert one.standing("ann").level == "clear"
    assert "another process reads the file" in caplog.text
