"""What the tuner learns from: prompts with the answers they should get, as tokens, in batches.

A batch is laid out so that all answers begin at one column: prompts are padded on the left, answers on the right. What
opens every prompt (system prompt, user header) can be computed once for the whole batch.

Shape letters: B lessons of a batch, P columns of prompts, A columns of answers, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spider_sense.chat import Chat
from spider_sense.data import Example

__all__ = ["Batch", "Kind", "Lesson", "batches", "by_length", "collate", "make_lessons"]

Kind = Literal["refuse", "answer"]
"""What the lesson teaches: to refuse a harmful prompt, or to keep on answering a benign one."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A prompt and the beginning of the answer it should get."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True, slots=True)
class Batch:
    """Lessons as tensors; see the module's text."""

    ids_BX: Tensor
    """int64 [B, P + A]."""
    mask_BX: Tensor
    """int64, 1 for real tokens."""
    target_BA: Tensor
    """int64, the answers; -100 where there is none."""
    refuse_B: Tensor
    """bool, which lessons are refusals."""
    index_B: tuple[int, ...]
    """Place of each lesson in the list that the batch was drawn from."""

    @property
    def answers(self) -> int:
        """A."""
        return self.target_BA.shape[1]


def make_lessons(
    chat: Chat,
    examples: Sequence[Example],
    answers: Sequence[str],
    kind: Kind,
    max_prompt: int = 160,
    max_answer: int = 24,
) -> list[Lesson]:
    """Render prompts and their answers; an answer that is not cut off ends with the tokenizer's end token.

    Args:
        chat: renders prompts as the server does.
        examples: N prompts.
        answers: N texts.
        kind: what they teach.
        max_prompt: tokens; a longer prompt is cut in the middle.
        max_answer: tokens.
    """
    end = [] if chat.tokenizer.eos_token_id is None else [chat.tokenizer.eos_token_id]
    lessons = []
    for example, text in zip(examples, answers, strict=True):
        prompt = chat.render(example.turns or example.text, max_prompt).ids
        answer = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], *end][:max_answer]
        if answer:
            lessons.append(Lesson(prompt, tuple(answer), kind))
    return lessons


def batches(lessons: Sequence[Lesson], size: int, steps: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Yield the places of each step's lessons: half refusals, half answers, each kind reshuffled when it is used up.

    The order depends on the seed only, so a run that is resumed at step ``start`` sees what it would have seen.
    """
    kinds = [[i for i, lesson in enumerate(lessons) if lesson.kind == kind] for kind in ("refuse", "answer")]
    streams = [_endless(places, seed + offset) for offset, places in enumerate(kinds) if places]
    for step in range(steps):
        chosen = [next(streams[row % len(streams)]) for row in range(size)]
        if step >= start:
            yield chosen


def collate(lessons: Sequence[Lesson], chosen: Sequence[int], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Lay out some lessons as a batch.

    Args:
        lessons: all of them.
        chosen: places of those in the batch.
        pad: token id of padding.
        device: where the tensors go.
    """
    rows = [lessons[place] for place in chosen]
    prompts, answers = max(len(row.prompt) for row in rows), max(len(row.answer) for row in rows)
    ids = np.full((len(rows), prompts + answers), pad, dtype=np.int64)
    mask, target = np.zeros_like(ids), np.full((len(rows), answers), -100, dtype=np.int64)
    for row, lesson in enumerate(rows):
        begin, end = prompts - len(lesson.prompt), prompts + len(lesson.answer)
        ids[row, begin:end] = lesson.prompt + lesson.answer
        mask[row, begin:end] = 1
        target[row, : len(lesson.answer)] = lesson.answer
    refuse = torch.tensor([lesson.kind == "refuse" for lesson in rows], device=device)
    ids_BX, mask_BX, target_BA = (torch.from_numpy(array).to(device) for array in (ids, mask, target))
    return Batch(ids_BX, mask_BX, target_BA, refuse, tuple(chosen))


def by_length(lessons: Sequence[Lesson], chosen: Sequence[int], size: int) -> list[list[int]]:
    """Split places into groups of at most ``size`` lessons of like length, so that little of a batch is padding."""
    order = sorted(chosen, key=lambda place: len(lessons[place].prompt) + len(lessons[place].answer))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _endless(places: Sequence[int], seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    while True:
        yield from (places[i] for i in rng.permutation(len(places)))
