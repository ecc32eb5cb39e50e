"""Only seams: what sets the KV blocks of a request apart from blocks of the same tokens, so that they are not lent.

What is computed under a patch is other KV. And where a head reads prompts alone, a block that holds generated tokens
knows nothing of what such a head would read in them as a part of the next prompt, so it serves none: the next turn of a
chat computes the answer before it once more.
"""

from collections.abc import Callable
from typing import Any

from spider_sense.serving.wrap import wrap

__all__ = ["install", "keep_answers_apart", "set_apart"]

_MARKS = "_spider_sense_marks"
"""Attribute of a request: name, first position and value of each thing that sets its blocks apart."""
_ANSWERS = "_spider_sense_answers_apart"
"""Attribute of a scheduler."""


def install() -> None:
    """Take hold of vLLM's classes and functions in this process."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "add_request", _added)
    for user in (kv_cache_utils, block_pool):
        wrap(user, "generate_block_hash_extra_keys", _keyed)


def keep_answers_apart(scheduler: Any) -> None:
    """Let no prompt begin with blocks that hold tokens which were generated."""
    setattr(scheduler, _ANSWERS, True)


def set_apart(request: Any, name: str, position: int, value: str) -> None:
    """Call the blocks of a request that reach past a position otherwise, if they have no keys yet.

    Args:
        request: vLLM's.
        name: of what sets them apart.
        position: first token of which it is true.
        value: alike where blocks may be shared.
    """
    setattr(request, _MARKS, (*getattr(request, _MARKS, ()), (name, position, value)))


def _added(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    # Until now it has keys of its prompt's blocks, and those stay shared.
    if hasattr(scheduler, _ANSWERS):
        set_apart(request, "spider_sense_answer", request.num_prompt_tokens, "apart")
    return original(request)


def _keyed(original: Callable[..., Any], request: Any, start: int, end: int, *args: Any) -> Any:
    keys, place = original(request, start, end, *args)
    # Pairs, as vLLM's own are.
    own = tuple((name, value) for name, position, value in getattr(request, _MARKS, ()) if end > position)
    return ((*(keys or ()), *own) if own else keys), place
