"""Marks on KV caches that hold tokens computed under a patch or a steer, so that no later request is given them.

The mark is an attribute of the cache, so a copy of the cache (``copy.deepcopy``) carries it, whoever passes it on and
whichever monitor is attached by then. A cache that is built anew from the tensors of another carries none; a guarded
call counts its tokens as missing, as it does those of every cache that it did not fill itself.
"""

from typing import Any

from spider_sense.errors import ConfigError

__all__ = ["check_unaltered", "mark_altered"]

_MARK = "_spider_sense_altered_from"


def mark_altered(cache: Any, column: int) -> None:
    """Note that the KV of some row of the batch is altered from a column on."""
    setattr(cache, _MARK, min(column, getattr(cache, _MARK, column)))


def check_unaltered(cache: Any) -> None:
    """Check that a cache holds nothing that was computed under a patch or a steer.

    One altered row is enough: rows of a cache can be selected, repeated and reordered, and carry no name. A cache that
    was reset, or cropped to before the mark, is as good as new.

    Args:
        cache: what a caller passes as ``past_key_values``; None passes.

    Raises:
        ConfigError: with the column from which on the cache is altered.
    """
    column = getattr(cache, _MARK, None)
    if column is None:
        return
    held = int(cache.get_seq_length())
    if held > column:
        raise ConfigError(
            f"past_key_values holds {held} tokens a row, and those from {column} on were computed under a patch or a "
            f"steer for another request; drop the last {held - column} (past_key_values.crop({column - held})), or "
            "leave it out"
        )
    delattr(cache, _MARK)
