"""What is asked of transformers' KV caches: how many columns one holds, and to be emptied."""

from typing import Any

from spider_sense.errors import ConfigError

__all__ = ["cached_columns", "empty"]


def cached_columns(cache: Any, counted: int) -> int:
    """Return the columns in a KV cache, 0 if it is None.

    A static cache would have to be asked on the device, so it is asked once, before the first pass, and then counted.

    Args:
        cache: what a pass is handed.
        counted: the columns of the passes so far.
    """
    from transformers import DynamicCache

    if cache is None:
        return 0
    return int(cache.get_seq_length()) if counted == 0 or isinstance(cache, DynamicCache) else counted


def empty(cache: Any) -> None:
    """Empty a KV cache, so that the pass that filled it can run again; None is empty.

    Raises:
        ConfigError: if it is no cache of transformers' own kinds; it is as it was then.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ConfigError(
            f"patch.begin is 'prompt', and a cache of type {type(cache).__name__} cannot be emptied to read a prompt "
            "again; pass a cache of transformers', or set patch.begin: token"
        )
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            # Releases of transformers before 5.19 would keep its columns and fill them with zeros.
            layer.is_initialized = False
    cache.reset()
