"""The store in Redis or Valkey, for several machines that serve one model.

Every change compares and sets: the new state is written only if the old one is still that which was read. A random
tag, new with every write, stands for the state in that comparison, so a principal that was erased and began anew
meanwhile is not taken for the old one, and a command that is sent twice counts once.

All keys share one hash tag, and so one slot of a cluster.
"""

import random
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from spider_sense.errors import MissingExtraError
from spider_sense.extraction.stores.redis_scripts import CLEAR, ERASE, GROUPS, LINK, SET
from spider_sense.extraction.stores.store import (
    Change,
    Entry,
    StoreError,
    check_clock,
    check_names,
    check_owner,
    missing,
    moment,
)

__all__ = ["RedisStore"]

_VERSION = "1"
_PREFIX = "{spider-sense}:"
_SEEN, _OWN, _GROUP, _PARTY = (_PREFIX + name for name in ("seen", "own", "group", "party"))
_SCHEMA, _OWNER, _EXPIRED = (_PREFIX + name for name in ("schema", "owner", "expired"))
_STATE = _PREFIX + "state:"
_BATCH = 256
"""Principals in one command, for whose time the server does nothing else."""


class RedisStore:
    """Keeps principals in a server; see :class:`spider_sense.extraction.stores.Store`.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads it.
        patience: seconds to wait for the server, and for other writers.
        make: whether to begin a store if the server holds none.

    Raises:
        MissingExtraError: if redis-py is not installed.
        StoreError: if the server cannot be reached, would forget what it has acknowledged, or holds another version.
    """

    def __init__(self, url: str, patience: float = 10.0, make: bool = True) -> None:
        try:
            import redis
        except ImportError as error:
            raise MissingExtraError("redis", "redis") from error
        self._error, self._refused = redis.RedisError, redis.ResponseError
        self._url, self._patience, self._stale = _without_password(url), patience, False
        with self._told():
            self._db: Any = redis.Redis.from_url(url, socket_timeout=patience, socket_connect_timeout=patience)
            scripts = (SET, ERASE, CLEAR, GROUPS, LINK)
            self._set, self._erase, self._clear, self._groups, self._link = map(self._db.register_script, scripts)
            self._check_server(make)

    def _check_server(self, make: bool) -> None:
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        for name, value in wanted.items():
            found = self._db.config_get(name).get(name)
            if found != value:
                raise StoreError(
                    f"{self._url} runs with {name} {found}, so it may forget what it has acknowledged; "
                    f"start the server with --{name} {value}"
                )
        if make:
            self._db.setnx(_SCHEMA, _VERSION)
        elif not self._db.exists(_SCHEMA):
            raise missing(self._url)
        found = self._db.get(_SCHEMA).decode()
        if found != _VERSION:
            raise StoreError(
                f"{self._url} has schema version {found}, this library reads {_VERSION}; use the version of "
                "spider-sense that wrote it, or another database of the server"
            )
        self._last_expiry()

    def _last_expiry(self) -> float:
        """Return the time of it; before the first one when somebody was last seen, or now."""
        newest = self._db.zrange(_SEEN, -1, -1, withscores=True)
        self._db.setnx(_EXPIRED, repr(newest[0][1] if newest else moment(None)))
        return float(self._db.get(_EXPIRED))

    def claim(self, owner: str) -> None:
        """Say what its states are made by, for good."""
        with self._told():
            self._db.setnx(_OWNER, owner)
            found = self._db.get(_OWNER).decode()
        check_owner(self._url, found, owner)

    def read(self, principal: str) -> bytes | None:
        """Return a principal's state, None if there is none."""
        check_names([principal])
        with self._told():
            state: bytes | None = self._db.hget(_STATE + principal, "state")
        return state

    def update(self, changes: Mapping[str, Change], seen: float | None = None) -> dict[str, Entry]:
        """Change some principals; of those that another writer changed meanwhile, ask again."""
        check_names(changes)
        deadline = time.monotonic() + self._patience
        kept: dict[str, Entry] = {}
        left = list(changes)
        try:
            with self._told():
                while left:
                    kept |= self._write({name: changes[name] for name in left[:_BATCH]}, moment(seen))
                    left = [name for name in left if name not in kept]
                    if left and time.monotonic() > deadline:
                        raise StoreError(
                            f"{self._url}: other writers changed {left[0]!r} for {self._patience:g} s; let fewer "
                            "replicas serve one principal"
                        )
        except Exception as error:
            if kept:
                raise StoreError(f"{error} ({len(kept)} of {len(changes)} changes are kept)", kept) from error
            raise
        return kept

    def _write(self, changes: Mapping[str, Change], seen: float) -> dict[str, Entry]:
        """Try to change some principals once, and return those that nobody else changed meanwhile."""
        keys = [_STATE + name for name in changes]
        found = self._pipe(lambda pipe: [pipe.hmget(key, "state", "standing", "tag") for key in keys])
        entries = {name: changes[name](_entry(*old)) for name, (*old, _) in zip(changes, found, strict=True)}
        args: list[Any] = [seen]
        for (name, entry), (*_, tag) in zip(entries.items(), found, strict=True):
            args += [name, tag or b"", secrets.token_bytes(8), entry.standing, entry.state]
        written = self._set(keys=[_SEEN, _OWN, *keys], args=args)
        kept = {name: entry for (name, entry), done in zip(entries.items(), written, strict=True) if done}
        if len(kept) < len(entries):
            time.sleep(random.uniform(0, 2e-3))  # noqa: S311
        return kept

    def principals(self) -> Iterator[tuple[str, bytes]]:
        """Yield every principal with its state."""
        with self._told():
            names = [name.decode() for name in self._db.zrange(_SEEN, 0, -1)]
        for batch in _batches(names):
            states = self._states(batch)
            yield from ((name, state) for name, state in zip(batch, states, strict=True) if state is not None)

    def _states(self, names: Sequence[str]) -> list[Any]:
        with self._told():
            return self._pipe(lambda pipe: [pipe.hget(_STATE + name, "state") for name in names])

    def standings(self) -> Iterator[tuple[str, str]]:
        """Yield every standing that is not empty."""
        with self._told():
            found = self._pipe(lambda pipe: [pipe.hgetall(_OWN), pipe.hgetall(_GROUP)])
        yield from ((name.decode(), standing.decode()) for each in found for name, standing in each.items())

    def mark_groups(self, standings: Mapping[str, str]) -> None:
        """Replace all that is said of principals because of their group."""
        check_names(standings)
        marked = {name: standing for name, standing in standings.items() if standing}
        with self._told():
            keys = [_GROUP, *(_STATE + name for name in marked)]
            self._groups(keys=keys, args=[part for pair in marked.items() for part in pair])

    def clear(self, principals: Collection[str]) -> int:
        """Take back the standings of some principals."""
        check_names(principals)
        with self._told():
            keys = [_OWN, _GROUP, *(_STATE + name for name in principals)]
            return int(self._clear(keys=keys, args=[secrets.token_bytes(8), *principals]))

    def link(self, principals: Collection[str]) -> None:
        """Declare that some principals, and all that they are linked with, are one."""
        check_names(principals)
        with self._told():
            self._link(keys=[_PARTY], args=[uuid4().hex, *principals])

    def unlink(self, principals: Collection[str]) -> int:
        """Take some principals out of what they are linked with."""
        check_names(principals)
        with self._told():
            return int(self._db.hdel(_PARTY, *principals)) if principals else 0

    def linked(self, principal: str) -> frozenset[str]:
        """Return whom a principal is linked with, itself included."""
        check_names([principal])
        return next((party for _, party in self.links() if principal in party), frozenset({principal}))

    def links(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield the name of every link, and the principals that it joins."""
        with self._told():
            found = self._db.hgetall(_PARTY)
        parties: dict[bytes, set[str]] = {}
        for name, party in found.items():
            parties.setdefault(party, set()).add(name.decode())
        yield from ((party.decode(), frozenset(names)) for party, names in parties.items() if len(names) > 1)

    def erase(self, principals: Collection[str]) -> int:
        """Remove some principals, and rewrite the server's files without them."""
        check_names(principals)
        with self._told():
            self._stale = True
            erased = self._remove(list(principals), "")
            self._rewrite_files()
        return erased

    def expire(self, before: float, sure: bool = False) -> int:
        """Erase those that were last seen before a time."""
        with self._told():
            now = moment(None) if sure else check_clock(self._url, self._last_expiry())
            self._db.set(_EXPIRED, repr(now))
            for batch in _batches(self._db.zrangebyscore(_SEEN, f"({now!r}", "+inf")):
                self._db.zadd(_SEEN, dict.fromkeys(batch, now), xx=True, lt=True)
            old = [name.decode() for name in self._db.zrangebyscore(_SEEN, "-inf", f"({before!r}")]
            self._stale |= bool(old)
            erased = self._remove(old, repr(before))
            if self._stale:
                self._rewrite_files()
        return erased

    def __len__(self) -> int:
        with self._told():
            return int(self._db.zcard(_SEEN))

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        self._db.close()

    def _remove(self, names: Sequence[str], before: str) -> int:
        keys = [_SEEN, _OWN, _GROUP, _PARTY]
        return sum(
            int(self._erase(keys=[*keys, *(_STATE + name for name in batch)], args=[before, *batch]))
            for batch in _batches(names)
        )

    def _rewrite_files(self) -> None:
        """Let the server write its log anew, and its snapshot if it keeps one: both still hold what was erased."""
        self._in_background(self._db.bgrewriteaof, ("aof_rewrite_in_progress", "aof_rewrite_scheduled"))
        if self._db.config_get("save").get("save"):
            self._in_background(self._db.bgsave, ("rdb_bgsave_in_progress",))
        self._stale = False

    def _in_background(self, start: Callable[[], object], busy: Sequence[str]) -> None:
        deadline = time.monotonic() + max(60.0, self._patience)
        started = False
        while True:
            state = self._db.info("persistence")
            if not any(state.get(flag) for flag in ("rdb_bgsave_in_progress", *busy)):
                if started:
                    break
                start()
                started = True
            if time.monotonic() > deadline:
                raise StoreError(f"{self._url}: erased, but the server's files still hold it; erase once more")
            time.sleep(0.02)
        if "err" in (state["aof_last_bgrewrite_status"], state["rdb_last_bgsave_status"]):
            raise StoreError(
                f"{self._url}: erased, but the server failed to write its files without it; see its log, make room on "
                "its disk, and erase once more"
            )

    def _pipe(self, fill: Callable[[Any], object]) -> list[Any]:
        with self._db.pipeline(transaction=False) as pipe:
            fill(pipe)
            replies: list[Any] = pipe.execute()
        return replies

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say which server an error is about."""
        try:
            yield
        except self._refused as error:
            raise StoreError(
                f"{self._url}: {error}; see which commands this user may give (docs/extraction.md)"
            ) from error
        except self._error as error:
            raise StoreError(f"{self._url}: {error}; see whether the server runs and can be reached") from error
        except ValueError as error:
            if hasattr(self, "_db"):
                raise
            raise StoreError(f"{self._url}: {error}; write redis://HOST:6379/0, rediss:// or unix://PATH") from error


def _entry(state: bytes | None, standing: bytes | None) -> Entry | None:
    return None if state is None or standing is None else Entry(state, standing.decode())


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (names[start : start + _BATCH] for start in range(0, len(names), _BATCH))


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    # It may stand before the host, or behind it as ?password=.
    return f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0]}"
