"""Greedy decoding of a batch of token ids: what opens every row is computed once, and a row that ended costs nothing.

Shape letters: B rows still running, P columns of the prompts, h tokens that open every row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nest.finite import check_finite

__all__ = ["end_tokens", "greedy", "left_padded"]

_WORTH = 4
"""A shared opening of fewer tokens is not worth a pass of its own."""
_DROP_AT = 0.75
"""Ended rows leave the batch, which copies the cache, once this share or less of it is running."""


@torch.inference_mode()
def greedy(
    model: nn.Module, rows: Sequence[Sequence[int]], max_new_tokens: int, ends: frozenset[int], pad: int
) -> list[list[int]]:
    """Continue each row by its likeliest tokens.

    Args:
        model: a transformers causal language model in eval mode.
        rows: prompts as token ids, each with at least one.
        max_new_tokens: most tokens to add.
        ends: tokens that end a row; they are not returned.
        pad: any token id, for the padding on the left.

    Returns:
        The added tokens of each row, in the order of the rows.

    Raises:
        DataError: if the model computes what is not a number.
    """
    head = _shared_head(model, rows, max_new_tokens)
    input_BP, mask_BP, position_BP = left_padded([row[head:] for row in rows], pad, _device(model))
    position_BP += head
    mask_BP = torch.cat((mask_BP.new_ones(len(rows), head), mask_BP), 1)
    cache = _head_cache(model, rows, head)
    running, answers = list(range(len(rows))), [[] for _ in rows]  # type: list[int], list[list[int]]
    for _ in range(max_new_tokens):
        best_B1, input_BP = _step(model, input_BP, mask_BP, position_BP, cache).max(-1, keepdim=True)
        check_finite(best_B1, "the logits of answers")
        mask_BP = torch.cat((mask_BP, mask_BP.new_ones(len(mask_BP), 1)), 1)
        position_BP = position_BP[:, -1:] + 1
        alive = _append(answers, running, input_BP[:, 0].tolist(), ends)
        if not alive:
            break
        if len(alive) <= _DROP_AT * len(running):
            keep = torch.tensor(alive, device=input_BP.device)
            cache.batch_select_indices(keep)
            input_BP, mask_BP, position_BP = input_BP[keep], mask_BP[keep], position_BP[keep]
            running = [running[place] for place in alive]
    return [_until(answer, ends) for answer in answers]


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out rows so that all end in the last column.

    Returns:
        Ids, mask (1 for real tokens) and positions (0 where padded), each int64 [B, P].
    """
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    mask_BP = torch.tensor(mask, device=device)
    return torch.tensor(ids, device=device), mask_BP, (mask_BP.cumsum(1) - 1).clamp_(min=0)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens after which the model's own ``generate`` ends a row, and the tokenizer's end token."""
    named = model.generation_config.eos_token_id
    several = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*several, tokenizer.eos_token_id] if token is not None)


def _shared_head(model: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Return how many tokens open every row; at least one is left to each."""
    longest = max(map(len, rows))
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    # The padding comes to stand after the opening, and a window is counted in columns.
    if len(rows) < 2 or (window is not None and window < longest + max_new_tokens):
        return 0
    shortest = min(map(len, rows))
    head = next((at for at in range(shortest - 1) if len({row[at] for row in rows}) > 1), shortest - 1)
    return head if head >= _WORTH else 0


def _head_cache(model: Any, rows: Sequence[Sequence[int]], head: int) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config())
    if head:
        ids_1h = torch.tensor([list(rows[0][:head])], device=_device(model))
        model(input_ids=ids_1h, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rows))
    return cache


def _step(model: Any, input_BP: Tensor, mask_BP: Tensor, position_BP: Tensor, cache: DynamicCache) -> Tensor:
    output = model(
        input_ids=input_BP,
        attention_mask=mask_BP,
        position_ids=position_BP,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]  # type: ignore[no-any-return]


def _append(answers: list[list[int]], running: list[int], tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Add a token to each running row; return the places in the batch that go on."""
    alive = []
    for place, (row, token) in enumerate(zip(running, tokens, strict=True)):
        ended = bool(answers[row]) and answers[row][-1] in ends
        if not ended:
            answers[row].append(token)
            if token not in ends:
                alive.append(place)
    return alive


def _until(answer: list[int], ends: frozenset[int]) -> list[int]:
    return answer[:-1] if answer and answer[-1] in ends else answer


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device  # type: ignore[no-any-return]
