"""The store in one SQLite file, for one machine: a write-ahead log, and every commit forced to the disk.

Several processes may share the file, on a local disk. A process that is killed loses what it had not committed, and
nothing else; the next one that opens the file cleans up by itself.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

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

__all__ = ["SqliteStore"]

_LOG = logging.getLogger(__name__)

_APPLICATION = 0x53705365
"""Stands in the header of the file, so that another program's database is not taken for a store."""
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE principal (name TEXT PRIMARY KEY, seen REAL NOT NULL, standing TEXT NOT NULL, state BLOB NOT NULL)",
    "CREATE INDEX by_seen ON principal (seen)",
    "CREATE INDEX by_standing ON principal (name) WHERE standing <> ''",
    "CREATE TABLE owner (only_one INTEGER PRIMARY KEY, owner TEXT NOT NULL)",
    "CREATE TABLE group_standing (name TEXT PRIMARY KEY, standing TEXT NOT NULL)",
    "CREATE TABLE party (name TEXT PRIMARY KEY, party TEXT NOT NULL)",
    "CREATE INDEX by_party ON party (party)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_PAGE = 256
"""Principals that are read at once."""


class SqliteStore:
    """Keeps principals in a file; see :class:`spider_sense.extraction.stores.Store`.

    Args:
        path: the file, for its owner alone to read and write if it is new. One that is there keeps its permissions.
        patience: seconds to wait for other writers.
        make: whether to make it if it is not there.

    Raises:
        StoreError: if it cannot be opened, or is no store of this version.
    """

    def __init__(self, path: str | Path, patience: float = 10.0, make: bool = True) -> None:
        self.path = Path(path)
        if not make and not self.path.exists():
            raise missing(str(path))
        self._patience = patience
        self._lock = threading.RLock()
        self._stale = False
        with self._told():
            self._make()
            self._db = sqlite3.connect(
                self.path, timeout=patience, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            try:
                self._begin()
            except BaseException:
                self._db.close()
                raise

    def _make(self) -> None:
        """Let nobody else read a new file; SQLite gives the files beside it the same permissions."""
        # Closing a file that is there would end the locks that this process holds on it. SQLite says what is wrong with
        # a path at which nothing can be made.
        with suppress(OSError):
            os.close(os.open(os.path.realpath(self.path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def _begin(self) -> None:
        # Before anything is written, lest another program's file be changed.
        self._check_header()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            self._db.execute(f"PRAGMA {pragma}")
        with self._transaction():
            if not self._check_header():
                for statement in _SCHEMA:
                    self._db.execute(statement)
        # Before anybody is seen under a clock that may be wrong.
        try:
            with self._transaction():
                self._last_expiry()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            # Who reads or erases what is damaged is told; what is whole can still be read.
            _LOG.error("%s: retention has no beginning: %s", self.path, error)

    def _last_expiry(self) -> float:
        """Return the time of it; before the first one when somebody was last seen, or now."""
        self._db.execute("CREATE TABLE IF NOT EXISTS expiry (only_one INTEGER PRIMARY KEY, last REAL NOT NULL)")
        self._db.execute(
            "INSERT OR IGNORE INTO expiry SELECT 1, coalesce((SELECT max(seen) FROM principal), ?)", (moment(None),)
        )
        return float(self._db.execute("SELECT last FROM expiry").fetchone()[0])

    def _check_header(self) -> bool:
        """Return whether the tables are there."""
        application, version, tables = (
            self._one("PRAGMA application_id"),
            self._one("PRAGMA user_version"),
            self._one("SELECT count(*) FROM sqlite_master"),
        )
        if (application, version, tables) == (0, 0, 0):
            return False
        if application != _APPLICATION:
            raise StoreError(f"{self.path} is a database of another program; name a new file")
        if version != _VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, this library reads {_VERSION}; use the version of "
                "spider-sense that wrote it, or begin a new file"
            )
        return True

    def claim(self, owner: str) -> None:
        """Say what its states are made by, for good."""
        with self._told(), self._transaction():
            self._db.execute("INSERT OR IGNORE INTO owner VALUES (1, ?)", (owner,))
            (found,) = self._db.execute("SELECT owner FROM owner").fetchone()
        check_owner(str(self.path), found, owner)

    def read(self, principal: str) -> bytes | None:
        """Return a principal's state, None if there is none."""
        check_names([principal])
        with self._told():
            entry = self._entry(principal)
        return None if entry is None else entry.state

    def update(self, changes: Mapping[str, Change], seen: float | None = None) -> dict[str, Entry]:
        """Change some principals in one transaction."""
        check_names(changes)
        with self._told(), self._transaction():
            kept = {name: change(self._entry(name)) for name, change in changes.items()}
            self._db.executemany(
                "INSERT INTO principal (name, seen, standing, state) VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET seen = max(seen, excluded.seen), standing = excluded.standing, state = excluded.state",
                [(name, moment(seen), entry.standing, entry.state) for name, entry in kept.items()],
            )
        return kept

    def principals(self) -> Iterator[tuple[str, bytes]]:
        """Yield every principal with its state; no lock is held in between."""
        last = 0
        while True:
            with self._told():
                rows = self._db.execute(
                    "SELECT rowid, name, state FROM principal WHERE rowid > ? ORDER BY rowid LIMIT ?", (last, _PAGE)
                ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield from ((name, state) for _, name, state in rows)

    def standings(self) -> Iterator[tuple[str, str]]:
        """Yield every standing that is not empty."""
        with self._told():
            rows = self._db.execute(
                "SELECT name, standing FROM principal WHERE standing <> '' "
                "UNION ALL SELECT name, standing FROM group_standing"
            ).fetchall()
        yield from rows

    def mark_groups(self, standings: Mapping[str, str]) -> None:
        """Replace all that is said of principals because of their group."""
        check_names(standings)
        rows = [(name, standing, name) for name, standing in standings.items() if standing]
        with self._told(), self._transaction():
            self._db.execute("DELETE FROM group_standing")
            self._db.executemany(
                "INSERT INTO group_standing SELECT ?, ? WHERE EXISTS (SELECT 1 FROM principal WHERE name = ?)", rows
            )

    def clear(self, principals: Collection[str]) -> int:
        """Take back the standings of some principals."""
        check_names(principals)
        cleared = 0
        with self._told(), self._transaction():
            for name in principals:
                own = self._db.execute("UPDATE principal SET standing = '' WHERE name = ? AND standing <> ''", (name,))
                group = self._db.execute("DELETE FROM group_standing WHERE name = ?", (name,))
                cleared += own.rowcount + group.rowcount > 0
        return cleared

    def link(self, principals: Collection[str]) -> None:
        """Declare that some principals, and all that they are linked with, are one."""
        check_names(principals)
        with self._told(), self._transaction():
            old = {found for name in principals if (found := self._party(name)) is not None}
            party = min(old, default=uuid4().hex)
            for other in old - {party}:
                self._db.execute("UPDATE party SET party = ? WHERE party = ?", (party, other))
            self._db.executemany("INSERT OR REPLACE INTO party VALUES (?, ?)", [(name, party) for name in principals])

    def unlink(self, principals: Collection[str]) -> int:
        """Take some principals out of what they are linked with."""
        check_names(principals)
        with self._told(), self._transaction():
            return sum(
                self._db.execute("DELETE FROM party WHERE name = ?", (name,)).rowcount for name in set(principals)
            )

    def linked(self, principal: str) -> frozenset[str]:
        """Return whom a principal is linked with, itself included."""
        check_names([principal])
        with self._told():
            rows = self._db.execute(
                "SELECT name FROM party WHERE party = (SELECT party FROM party WHERE name = ?)", (principal,)
            ).fetchall()
        return frozenset({principal, *(name for (name,) in rows)})

    def links(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield the name of every link, and the principals that it joins."""
        with self._told():
            rows = self._db.execute("SELECT party, name FROM party").fetchall()
        parties: dict[str, set[str]] = {}
        for party, name in rows:
            parties.setdefault(party, set()).add(name)
        yield from ((party, frozenset(names)) for party, names in parties.items() if len(names) > 1)

    def erase(self, principals: Collection[str]) -> int:
        """Remove some principals, from free pages and from the log as well."""
        check_names(principals)
        with self._told():
            with self._transaction():
                erased = sum(self._erase(name) for name in principals)
            self._empty_log()
        return erased

    def expire(self, before: float, sure: bool = False) -> int:
        """Erase those that were last seen before a time."""
        with self._told():
            with self._transaction():
                last = self._last_expiry()
                now = moment(None) if sure else check_clock(str(self.path), last)
                self._db.execute("UPDATE expiry SET last = ?", (now,))
                self._db.execute("UPDATE principal SET seen = ? WHERE seen > ?", (now, now))
                old = self._db.execute("SELECT name FROM principal WHERE seen < ?", (before,)).fetchall()
                for (name,) in old:
                    self._erase(name)
            if old or self._stale:
                self._empty_log()
        return len(old)

    def __len__(self) -> int:
        with self._told():
            return int(self._one("SELECT count(*) FROM principal"))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._db.close()

    def _erase(self, name: str) -> int:
        for table in ("group_standing", "party"):
            self._db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))  # noqa: S608
        return self._db.execute("DELETE FROM principal WHERE name = ?", (name,)).rowcount

    def _empty_log(self) -> None:
        """Move what the log holds into the file and cut it off: it still holds pages as they were."""
        self._stale = True
        busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(
                f"{self.path}: erased, but another process reads the file, so that its log still holds what was "
                "erased; erase once more when it has ended"
            )
        self._stale = False

    def _entry(self, name: str) -> Entry | None:
        row = self._db.execute("SELECT state, standing FROM principal WHERE name = ?", (name,)).fetchone()
        return None if row is None else Entry(*row)

    def _party(self, name: str) -> str | None:
        row = self._db.execute("SELECT party FROM party WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _one(self, statement: str) -> int:
        return int(self._db.execute(statement).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the file's one place for writers, and keep all of what is written or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let one thread in at a time, and say which file an error is about."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"{self.path}: {error}; {self._advice(error)}") from error

    def _advice(self, error: sqlite3.Error) -> str:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return {
            sqlite3.SQLITE_BUSY: f"another process has held the file for {self._patience:g} s; end it, or wait longer",
            sqlite3.SQLITE_CANTOPEN: "make its folder, and let this user write there",
            sqlite3.SQLITE_CORRUPT: "the file is damaged; move it away, and put a copy in its place or begin a new one",
            sqlite3.SQLITE_FULL: "make room on the disk",
            sqlite3.SQLITE_NOTADB: "the file is no database, or damaged; move it away, or name another",
            sqlite3.SQLITE_READONLY: "let this user write the file and its folder",
        }.get(code, "open the store anew")
