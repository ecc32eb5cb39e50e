"""Where the state of principals is kept: a file of SQLite's, or a Redis server that several replicas share."""

from spider_sense.errors import ConfigError
from spider_sense.extraction.stores.redis import RedisStore
from spider_sense.extraction.stores.sqlite import SqliteStore
from spider_sense.extraction.stores.store import LONGEST_NAME, Change, Entry, Store, StoreError

__all__ = ["LONGEST_NAME", "Change", "Entry", "RedisStore", "SqliteStore", "Store", "StoreError", "open_store"]


def open_store(place: str, patience: float = 10.0, make: bool = True) -> Store:
    """Open the store at a place.

    Args:
        place: path of a SQLite file, or a server as ``redis://``, ``rediss://`` or ``unix://``.
        patience: seconds to wait for other writers, and for the server.
        make: whether to make it if it is not there; if not, that is an error.

    Raises:
        ConfigError: if the place is of another kind.
        StoreError: if it cannot be opened.
        MissingExtraError: if a server is named and redis-py is not installed.
    """
    scheme, mark, _ = place.partition("://")
    if not mark:
        return SqliteStore(place, patience, make)
    if scheme in ("redis", "rediss", "unix"):
        return RedisStore(place, patience, make)
    raise ConfigError(f"{scheme}:// names no store; give the path of a file, or redis://, rediss:// or unix://")
