"""The way from an engine to the detector and back, beside the path of the tokens.

An engine offers what it saw of a request and goes on at once. One thread hashes it, folds it into the principal's
state within the store, and keeps what was decided where the next request of that principal finds it. Nothing is lost
in silence: what does not fit into the queue, or cannot be folded, is counted, and its principal's standing is unknown
until a later request of it has been folded.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from spider_sense.errors import StateError
from spider_sense.extraction.decision import Decision
from spider_sense.extraction.detector import Detector
from spider_sense.extraction.event import Event
from spider_sense.extraction.feed_counts import Fate, FeedCounts
from spider_sense.extraction.losses import Losses
from spider_sense.extraction.observation import Observation
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.extraction.standing import CLEAR, Standing, decision_of, strictest, text_of
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.stores import Entry, Store, StoreError

__all__ = ["Encode", "Feed"]

Encode = Callable[[Observation, str | None], Event]
"""Takes a request and the name of its principal's declared party, if it has one."""
_LOG = logging.getLogger(__name__)
_HOUR = 3600.0
_LONGEST_WAIT = 5.0
"""Seconds between tries while a store fails."""


class Feed:
    """Feeds a detector.

    Args:
        store: where states are kept; closed with the feed.
        detector: what finds.
        encode: makes an event of what was seen.
        settings: how much at once, and for how long it is kept.

    Raises:
        StoreError: if the store cannot be read.
    """

    def __init__(self, store: Store, detector: Detector, encode: Encode, settings: ExtractionSettings) -> None:
        self._store, self._detector, self._encode, self._pace = store, detector, encode, settings
        self._waiting: queue.Queue[tuple[float, Observation]] = queue.Queue(settings.queue)
        self._found: dict[str, Decision] = {}
        self._unreadable: frozenset[str] = frozenset()
        self._parties: dict[str, str] = {}
        self._losses = Losses()
        self._down = ""
        self._closing = threading.Event()
        self.counts = FeedCounts()
        """What has become of the requests so far."""
        for party in settings.linked:
            store.link(party)
        self._refresh()
        self._thread = threading.Thread(target=self._run, name="spider-sense-extraction", daemon=True)
        self._thread.start()

    def standing(self, principal: str) -> Standing:
        """Return how a principal stands; this never waits."""
        if self._down:
            return Standing("unknown", self._down)
        found, gap = self._found.get(principal), self._gap(principal)
        # What is missing could make nothing worse of one who is acted on already.
        if gap and (found is None or found.level != "act"):
            return Standing("unknown", gap)
        return CLEAR if found is None else Standing(found.level, f"{found.tier}: {'; '.join(found.evidence)}")

    def _gap(self, principal: str) -> str:
        """Say what of a principal is not known; empty if nothing."""
        if principal in self._losses:
            return "a request of this principal was lost"
        return "what was found of this principal cannot be read" if principal in self._unreadable else ""

    def offer(self, seen: Observation) -> None:
        """Take in a request; this never waits."""
        offered = time.monotonic()
        try:
            self._waiting.put_nowait((offered, seen))
        except queue.Full:
            self._lose(seen.principal, "dropped", offered)

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all that was offered so far is committed, or counted as lost; return whether it is."""
        deadline = time.monotonic() + timeout
        with self._waiting.all_tasks_done:
            while self._waiting.unfinished_tasks:
                left = deadline - time.monotonic()
                if left <= 0 or not self._waiting.all_tasks_done.wait(left):
                    return False
        return True

    def close(self, timeout: float = 10.0) -> None:
        """Fold what waits, for so many seconds at most, and close the store; a second call does nothing."""
        if self._closing.is_set():
            return
        if not self.flush(timeout):
            _LOG.error("%d requests were not folded before the feed closed", self._waiting.unfinished_tasks)
        self._closing.set()
        self._thread.join(timeout)
        self._down = "the extraction feed is closed"
        self._store.close()

    def _run(self) -> None:
        # The first erasure does not wait for an hour: a server may be started anew more often than that.
        refreshed, expired = time.monotonic(), -math.inf
        while not self._closing.is_set():
            batch = self._take()
            try:
                self._fold(batch)
                if time.monotonic() - refreshed > self._pace.refresh_seconds:
                    self._refresh()
                    refreshed = time.monotonic()
                if time.monotonic() - expired > _HOUR:
                    self._expire()
                    expired = time.monotonic()
            except Exception as error:
                self._fail(error)
            now = time.monotonic()
            self.counts.took([now - offered for offered, _ in batch], self._waiting.qsize())
            for _ in batch:
                self._waiting.task_done()

    def _take(self) -> list[tuple[float, Observation]]:
        """Wait for a request, and a little for others."""
        deadline = time.monotonic() + self._pace.flush_seconds
        batch: list[tuple[float, Observation]] = []
        while len(batch) < self._pace.batch and (left := deadline - time.monotonic()) > 0:
            try:
                batch.append(self._waiting.get(timeout=left))
            except queue.Empty:
                break
        return batch

    def _fold(self, batch: Sequence[tuple[float, Observation]]) -> None:
        """Fold requests into the store; what is wrong with one principal's leaves the others' alone."""
        events: dict[str, list[Event]] = {}
        latest: dict[str, float] = {}
        for offered, seen in batch:
            try:
                event = self._encode(seen, self._parties.get(seen.principal))
            except Exception:
                _LOG.exception("a request of %r cannot be read", seen.principal)
                self._lose(seen.principal, "failed", offered)
            else:
                events.setdefault(seen.principal, []).append(event)
                latest[seen.principal] = offered
        unfolded = [name for name, mine in self._commit(events).items() if self._commit({name: mine})]
        for name in unfolded:
            self._lose(name, "failed", latest.pop(name), len(events[name]))
        for name, offered in latest.items():
            self._losses.folded(name, offered)

    def _commit(self, events: Mapping[str, Sequence[Event]]) -> Mapping[str, Sequence[Event]]:
        """Write until the store takes it or the feed closes; return what the detector could not fold."""
        left, wait = dict(events), 0.1
        while left:
            new: dict[str, list[Decision]] = {}
            try:
                kept = self._store.update({name: partial(self._change, mine, new) for name, mine in left.items()})
            except StoreError as error:
                self._fail(error)
                self._settle({name: left.pop(name) for name in error.committed if name in left}, new)
                if self._closing.wait(wait):
                    for name, mine in left.items():
                        self._lose(name, "failed", math.inf, len(mine))
                    return {}
                wait = min(2 * wait, _LONGEST_WAIT)
            except Exception:
                _LOG.exception("requests of %s cannot be folded", ", ".join(map(repr, left)))
                return left
            else:
                self._settle({name: left.pop(name) for name in kept}, new)
                self._down = ""
        return {}

    def _change(self, events: Sequence[Event], new: dict[str, list[Decision]], old: Entry | None) -> Entry:
        """Return what is kept of a principal after some more events: of its decisions the strictest stands."""
        name = events[0].principal
        state = PrincipalState.from_bytes(old.state) if old else self._detector.open(name)
        decisions: list[Decision] = []
        for event in events:
            state, more = self._detector.update(state, event)
            decisions += more
        new[name] = decisions
        standing = strictest([*([decision_of(old.standing)] if old and old.standing else []), *decisions])
        return Entry(state.to_bytes(), "" if standing is None else text_of(standing))

    def _settle(self, events: Mapping[str, Sequence[Event]], new: Mapping[str, Sequence[Decision]]) -> None:
        """Take note of what is committed."""
        for name, mine in events.items():
            self.counts.add("folded", len(mine))
            self.counts.decided(new[name])
            for decision in new[name]:
                _LOG.warning("extraction: %r: %s by %s: %s", name, decision.level, decision.tier, decision.evidence)
            known = [self._found[name]] if name in self._found else []
            if found := strictest([*known, *new[name]]):
                self._found[name] = found

    def _refresh(self) -> None:
        """Look at what is kept, by other replicas, by reviews of groups and by operators too."""
        found: dict[str, Decision] = {}
        unreadable: set[str] = set()
        for name, text in self._store.standings():
            try:
                decision = decision_of(text)
            except StateError as error:
                unreadable.add(name)
                if name not in self._unreadable:
                    _LOG.error("the standing of %r is unknown: %s", name, error)
            else:
                found[name] = strictest([found[name], decision]) or decision if name in found else decision
        self._unreadable = frozenset(unreadable)
        self._parties = {name: party for party, names in self._store.links() for name in names}
        self._found, self._down = found, ""

    def _expire(self) -> None:
        if self._pace.retention_days is None:
            return
        try:
            erased = self._store.expire(time.time() - self._pace.retention_days * 24 * _HOUR)
        except StoreError as error:
            # What is to be erased is no evidence that is missing: the feed goes on, and tries again in an hour.
            self.counts.add("store_errors")
            _LOG.error("principals that sent nothing for %g days: %s", self._pace.retention_days, error)
        else:
            _LOG.info("%d principals were erased, not seen for %g days", erased, self._pace.retention_days)

    def _lose(self, name: str, fate: Fate, offered: float, number: int = 1) -> None:
        self.counts.add(fate, number)
        self._losses.lost(name, offered)

    def _fail(self, error: Exception) -> None:
        self.counts.add("store_errors")
        if not self._down:
            _LOG.error("the extraction feed is down: %s", error)
        self._down = f"the extraction feed is down: {error}"
