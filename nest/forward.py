"""One pass over a batch of lessons: next-token logits where the answers are.

Shape letters: B lessons, X columns of prompt and answer, A columns of answers, h columns that all prompts share,
V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nest.lessons import Batch

__all__ = ["answer_logits"]

_WORTH = 4
"""A shared opening of fewer tokens is not worth a pass of its own."""


def answer_logits(model: nn.Module, batch: Batch, share_head: bool = True) -> Tensor:
    """Return the logits that predict each answer token, [B, A, V]; gradients flow.

    Args:
        model: a transformers causal language model.
        batch: lessons.
        share_head: compute tokens that open every prompt once and not B times; the result is the same.
    """
    head = _shared_head(batch) if share_head and _fits_window(model, batch) else 0
    position_BX = (batch.mask_BX.cumsum(1) - 1).clamp_(min=0)
    inputs: dict[str, Any] = {"logits_to_keep": batch.answers + 1, "use_cache": head > 0}
    ids_BX, mask_BX = batch.ids_BX, batch.mask_BX
    if head:
        ids_BX, mask_BX, position_BX = _without_head(batch, head)
        inputs["past_key_values"] = _head_cache(model, batch, head)
    # A slice of columns would be multiplied lesson by lesson.
    with model.get_output_embeddings().register_forward_pre_hook(_in_one_piece):  # type: ignore[operator]
        output = model(input_ids=ids_BX, attention_mask=mask_BX, position_ids=position_BX, **inputs)
    return output.logits[:, :-1]  # type: ignore[no-any-return]


def _in_one_piece(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


def _fits_window(model: nn.Module, batch: Batch) -> bool:
    """Whether padding may come to stand after the opening: a sliding window counts columns, padding too."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)  # type: ignore[union-attr, operator]
    return window is None or batch.ids_BX.shape[1] <= window


def _shared_head(batch: Batch) -> int:
    """Return how many tokens open every prompt of the batch; at least one is left to each."""
    begin_B = batch.mask_BX.argmax(1)
    shortest = int((batch.ids_BX.shape[1] - batch.answers - begin_B).min())
    rows = [batch.ids_BX[row, begin : begin + shortest - 1] for row, begin in enumerate(begin_B.tolist())]
    same = (torch.stack(rows) == rows[0]).all(0).int()
    head = int(same.cumprod(0).sum())
    return head if head >= _WORTH and len(rows) > 1 else 0


def _without_head(batch: Batch, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and positions of what follows the shared opening; the mask covers that opening too."""
    begin_B1 = batch.mask_BX.argmax(1, keepdim=True)
    column_X = torch.arange(batch.ids_BX.shape[1], device=batch.ids_BX.device)
    own_BX = batch.mask_BX * (column_X >= begin_B1 + head)
    first = head + int(begin_B1.min())
    own_BY = own_BX[:, first:]
    position_BY = (head + own_BY.cumsum(1) - 1).clamp_(min=0)
    mask_BZ = torch.cat((own_BY.new_ones(len(own_BY), head), own_BY), 1)
    return batch.ids_BX[:, first:], mask_BZ, position_BY


def _head_cache(model: nn.Module, batch: Batch, head: int) -> Any:
    begin = int(batch.mask_BX[0].argmax())
    ids_1h = batch.ids_BX[:1, begin : begin + head]
    cache = model(input_ids=ids_1h, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(batch.ids_BX))
    return cache
