"""What a user may do to a tuned model without any ill will: fine-tune it for an epoch on harmless conversations.

That alone undoes much of an aligned model's safety (Qi et al., arXiv 2310.03693, section 4.4; learning rate 2e-5).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nest.forward import answer_logits
from nest.lessons import Lesson, collate, make_lessons
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

__all__ = ["LEARNING_RATE", "fine_tuned", "with_response"]

LEARNING_RATE = 2e-5
BATCH = 8
PROMPT_TOKENS, ANSWER_TOKENS = 160, 64


def with_response(examples: Sequence[Example]) -> list[Example]:
    """Return the prompts whose rows say how they were answered: what can be fine-tuned on."""
    return [example for example in examples if example.response]


@contextmanager
def fine_tuned(loaded: LoadedModel, examples: Sequence[Example], seed: int = 0) -> Iterator[int]:
    """Train every weight for one epoch inside the block, and put the very same weights back after it.

    Args:
        loaded: the model, in float32.
        examples: conversations; of each, the prompt and its response are used.
        seed: of their order.

    Yields:
        The number of steps.

    Raises:
        DataError: if no example has a response.
    """
    usable = with_response(examples)
    if not usable:
        raise DataError(f"none of {len(examples)} benign rows has a 'response' to fine-tune on; name a file with some")
    responses = [example.response or "" for example in usable]
    lessons = make_lessons(Chat(loaded.tokenizer), usable, responses, "answer", PROMPT_TOKENS, ANSWER_TOKENS)
    parameters = list(loaded.model.parameters())
    kept = [(weight.detach().clone(), weight.requires_grad) for weight in parameters]
    try:
        yield _epoch(loaded, lessons, seed)
    finally:
        with torch.no_grad():
            for weight, (before, trainable) in zip(parameters, kept, strict=True):
                weight.copy_(before)
                weight.requires_grad_(trainable).grad = None


def _epoch(loaded: LoadedModel, lessons: Sequence[Lesson], seed: int) -> int:
    model, pad = loaded.model, loaded.tokenizer.pad_token_id or 0
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    order = np.random.default_rng(seed).permutation(len(lessons)).tolist()
    starts = range(0, len(order), BATCH)
    with torch.enable_grad():
        for start in starts:
            _loss(model, lessons, order[start : start + BATCH], pad).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return len(starts)


def _loss(model: nn.Module, lessons: Sequence[Lesson], chosen: Sequence[int], pad: int) -> Tensor:
    batch = collate(lessons, chosen, pad, next(model.parameters()).device)
    logits_BAV = answer_logits(model, batch)
    return cross_entropy(logits_BAV.flatten(0, 1).float(), batch.target_BA.flatten(), ignore_index=-100)
