"""What comes from the prefix cache ends before the template's tail, for guards that read only that."""

from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.models import LoadedModel
from spider_sense.serving.prefix import keep_tail, tail_of

SIZE = 16


class Manager:
    """As much of vLLM's manager of KV blocks as is touched, with everything in the cache."""

    def __init__(self) -> None:
        self.coordinator = SimpleNamespace(find_longest_cache_hit=lambda hashes, most: min(most // SIZE, len(hashes)))

    def get_computed_blocks(self, request: Any) -> int:
        blocks: int = self.coordinator.find_longest_cache_hit(request.hashes, request.num_tokens - 1)
        return blocks * SIZE


def request(prompt: int, output: int = 0) -> Any:
    return SimpleNamespace(
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        num_tokens=prompt + output,
        hashes=range((prompt + output) // SIZE),
    )


@pytest.mark.parametrize(
    ("prompt", "output", "cached"),
    [(64, 0, 48), (66, 0, 48), (69, 0, 64), (70, 0, 64), (3, 0, 0), (20, 0, 0), (66, 1, 64), (66, 40, 96)],
)
def test_a_hit_ends_before_the_tail_until_the_request_has_answered(prompt: int, output: int, cached: int) -> None:
    manager = Manager()
    keep_tail(manager, 5)
    assert manager.get_computed_blocks(request(70, 30)) == 96, "one request leaves nothing behind for the next"
    assert manager.get_computed_blocks(request(prompt, output)) == cached


def test_the_tail_is_kept_only_for_heads_that_read_nothing_else(tiny_loaded: LoadedModel, guards: Any) -> None:
    plain = guards.guard(tiny_loaded, guards.many_probes()[:1])
    assert tail_of(plain) == 0
    tail = guards.guard(tiny_loaded, (*guards.many_probes()[:1], guards.probe("end", "mean", "resid.1", span="tail")))
    assert tail_of(tail) == guards.TAIL == 2
