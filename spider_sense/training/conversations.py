"""Conversations on their way into the model: rendered, keyed by what they are made of, and batched by length."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spider_sense.chat import Chat
from spider_sense.data import Example

__all__ = ["Conversation", "batches", "conversation", "padded"]

GENERATED_TOGETHER = 32
"""Conversations that are continued in one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is captured of one example."""

    id: str
    ids: tuple[int, ...]
    """The prompt, and the response if the example has one."""
    prompt: int
    """Tokens of the prompt."""
    skip: int
    generate: int
    """Tokens to generate."""

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response, as many as they may become."""
        return len(self.ids) + self.generate

    def key(self, ends: frozenset[int]) -> str:
        """Return a digest of all that the activations depend on beside the model; ``ends`` end a generated response."""
        parts = [self.ids, self.prompt, self.skip, [self.generate, sorted(ends)] if self.generate else 0]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def conversation(chat: Chat, example: Example, respond: int, max_tokens: int) -> Conversation:
    """Render an example; see `spider_sense.training.collect.collect`."""
    rendered = chat.render(example.turns or example.text, max_tokens)
    forced: list[int] = []
    if respond and example.response is not None:
        forced = chat.tokenizer(example.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return Conversation(
        id=example.id,
        ids=(*rendered.ids, *forced[:respond]),
        prompt=len(rendered.ids),
        skip=rendered.skip,
        generate=respond if example.response is None else 0,
    )


def batches(conversations: Sequence[Conversation], batch_tokens: int) -> Iterator[list[Conversation]]:
    """Group conversations of like length and the same number of tokens to generate.

    Args:
        conversations: at least one.
        batch_tokens: padded tokens of a batch, where nothing is generated.
    """
    # Longest first: memory that is too small shows itself at once.
    order = sorted(conversations, key=lambda item: (item.generate, len(item.ids)), reverse=True)
    batch: list[Conversation] = []
    for item in order:
        if batch and not _fits(batch, item, batch_tokens):
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _fits(batch: Sequence[Conversation], item: Conversation, batch_tokens: int) -> bool:
    if item.generate != batch[0].generate:
        return False
    if item.generate:
        return len(batch) < GENERATED_TOGETHER
    return (len(batch) + 1) * len(batch[0].ids) <= batch_tokens


def padded(batch: Sequence[Conversation], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 [B, T], padded on the left or on the right."""
    longest = max(len(item.ids) for item in batch)
    ids_BT = torch.full((len(batch), longest), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, item in enumerate(batch):
        place = slice(longest - len(item.ids), longest) if left else slice(len(item.ids))
        ids_BT[row, place] = torch.tensor(item.ids)
        mask_BT[row, place] = 1
    return ids_BT, mask_BT
