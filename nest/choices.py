"""Log-likelihoods of continuations of a text: each text is computed once, whatever the number of its continuations.

Shape letters: B texts, K continuations of each, P columns of the texts, A columns of the continuations, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nest.finite import check_finite
from nest.greedy import left_padded

__all__ = ["Question", "Scored", "score_questions"]


@dataclass(frozen=True, slots=True)
class Question:
    """A text and its continuations, as token ids; none is empty."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of the continuations of one text."""

    log_likelihood: tuple[float, ...]
    """In nats, summed over the tokens of each continuation."""
    greedy: tuple[bool, ...]
    """Whether each continuation is what greedy decoding would have written."""


@torch.inference_mode()
def score_questions(model: Any, questions: Sequence[Question], pad: int) -> list[Scored]:
    """Score a batch of texts with equally many continuations each.

    Args:
        model: a transformers causal language model in eval mode.
        questions: B of them; texts of similar length waste the least.
        pad: any token id, for padding: texts on the left, continuations on the right.

    Raises:
        DataError: if the model computes what is not a number.
    """
    device = next(model.parameters()).device
    ids_BP, mask_BP, position_BP = left_padded([question.prompt for question in questions], pad, device)
    cache = DynamicCache(config=model.config.get_text_config())
    output = model(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        position_ids=position_BP,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    each = len(questions[0].choices)
    logits = output.logits.float().repeat_interleave(each, 0)
    target, real = _right_padded([choice for question in questions for choice in question.choices], device)
    if target.shape[1] > 1:
        logits = torch.cat((logits, _later_logits(model, cache, mask_BP, target, real, each)), 1)
    log_likelihood = logits.gather(-1, target[..., None])[..., 0] - logits.logsumexp(-1)
    sums = (log_likelihood * real).sum(1).view(-1, each)
    check_finite(sums, "the log-likelihoods of choices")
    greedy = ((logits.argmax(-1) == target) | ~real).all(1).view(-1, each)
    return [Scored(tuple(row), tuple(flags)) for row, flags in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _later_logits(model: Any, cache: DynamicCache, mask_BP: Tensor, target: Tensor, real: Tensor, each: int) -> Tensor:
    """Return the logits that predict every token of the continuations but the first, [B * K, A - 1, V]."""
    cache.batch_repeat_interleave(each)
    mask_BP = mask_BP.repeat_interleave(each, 0)
    first = mask_BP.sum(1, keepdim=True)
    output = model(
        input_ids=target[:, :-1],
        attention_mask=torch.cat((mask_BP, real[:, :-1].long()), 1),
        position_ids=first + torch.arange(target.shape[1] - 1, device=target.device),
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits.float()  # type: ignore[no-any-return]


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]
