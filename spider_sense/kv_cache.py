"""What is asked of transformers' KV caches: how many columns one holds, and to be emptied."""

from typing import Any

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


def empty(cache: Any) -> bool:
    """Empty a KV cache, so that the pass that filled it can run again; None is empty.

    Returns:
        Whether it could be done; if not, the cache is as it was.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    if cache is None:
        return True
    if not isinstance(cache, Cache):
        return False
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            # Older releases of transformers keep its columns and fill them with zeros.
            layer.is_initialized = False
    cache.reset()
    return True
