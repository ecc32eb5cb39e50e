"""How much of a prompt may come from the prefix cache: not the template's tail, where a head reads nothing else.

A cached block that reaches into a prompt's tail was filled for another prompt, whose tail lies elsewhere, so nobody
knows what such a head would have read in it. Its tokens are computed again.
"""

from collections.abc import Sequence
from typing import Any

from spider_sense.guard import Guard

__all__ = ["keep_tail", "reads_prompts_alone", "tail_of"]


def tail_of(guard: Guard) -> int:
    """Return how many tokens at the end of a prompt have to be computed for a guard."""
    tail_only = any(probe.aggregator.span == "tail" for probe in guard.probes)
    return guard.manifest.template.tail if tail_only else 0


def reads_prompts_alone(guard: Guard) -> bool:
    """Return whether a head reads the tokens of a prompt, and not the same tokens where they are generated."""
    return any(probe.aggregator.span == "prompt" for probe in guard.probes)


def keep_tail(manager: Any, tail: int) -> None:
    """Keep hits of a prefix cache out of the tails of prompts.

    Args:
        manager: vLLM's ``KVCacheManager``; one thread asks it for blocks.
        tail: tokens of a tail.
    """
    coordinator = manager.coordinator
    computed_blocks, longest_hit = manager.get_computed_blocks, coordinator.find_longest_cache_hit
    limit: int | None = None

    def get_computed_blocks(request: Any) -> Any:
        nonlocal limit
        # A preempted request that has answered already keeps the state after its tail.
        answered = request.num_output_tokens > 0
        limit = None if answered else max(0, request.num_prompt_tokens - tail)
        return computed_blocks(request)

    def find_longest_cache_hit(hashes: Sequence[Any], most: int) -> Any:
        return longest_hit(hashes, most if limit is None else min(most, limit))

    manager.get_computed_blocks = get_computed_blocks
    coordinator.find_longest_cache_hit = find_longest_cache_hit
