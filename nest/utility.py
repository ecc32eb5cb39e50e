"""Utility by log-likelihood: which choice a model finds likeliest, and whether it knows a passage's last word.

Texts go in as they are, without the chat template, with no examples before them: a base model's protocol, kept because
it needs no judge. A text ``Question: ...`` is joined to a choice by ``\\nAnswer: ``, any other by a blank. Accuracy
comes in two kinds, as in EleutherAI's evaluation harness: by the choice's log-likelihood, and by that divided by the
choice's number of characters.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nest.choices import Question, Scored, score_questions
from nest.subsets import subset
from nest.tasks import Task, TaskRow
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

__all__ = ["TaskScore", "score_task"]

MAX_PROMPT, MAX_CHOICE = 512, 128
"""Tokens; longer texts lose their beginning, longer choices their end."""
BATCH_TOKENS = 1536
"""Logits that are held at a time: one row of the vocabulary each."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a model got right, row by row."""

    task: str
    ids: tuple[str, ...]
    correct: tuple[bool, ...]
    """By log-likelihood; in a last-word task, whether greedy decoding writes the word."""
    correct_normalised: tuple[bool, ...]
    """By log-likelihood per character; the same as ``correct`` in a last-word task."""
    normalised: bool
    """Which of the two is the task's figure."""

    @property
    def outcomes(self) -> tuple[bool, ...]:
        """The outcomes that the task's figure is the mean of."""
        return self.correct_normalised if self.normalised else self.correct


def score_task(
    loaded: LoadedModel,
    task: Task,
    limit: int | None = None,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> TaskScore:
    """Score a task, or a fixed part of it.

    Args:
        loaded: the model and its tokenizer.
        task: questions with choices, or with a last word.
        limit: most rows; which ones depends on the seed and their ids.
        seed: another seed gives another part.
        advance: called with the number of rows done.

    Raises:
        DataError: if the task holds documents, or a text or choice has no tokens.
    """
    if task.kind == "documents":
        raise DataError(f"{task.name} holds documents without choices; measure perplexity on it")
    rows = subset(task.rows, limit, seed, lambda row: row.id)
    questions = [_question(loaded.tokenizer, row) for row in rows]
    scored: dict[int, Scored] = {}
    for places in _batches(questions):
        batch = score_questions(loaded.model, [questions[place] for place in places], _pad(loaded.tokenizer))
        scored.update(zip(places, batch, strict=True))
        if advance is not None:
            advance(len(places))
    return _outcomes(task, rows, [scored[place] for place in range(len(rows))])


def _outcomes(task: Task, rows: Sequence[TaskRow], scored: Sequence[Scored]) -> TaskScore:
    if task.kind == "last_word":
        plain = normalised = tuple(score.greedy[0] for score in scored)
    else:
        plain = tuple(_best(score.log_likelihood) == row.gold for row, score in zip(rows, scored, strict=True))
        normalised = tuple(
            _best([nats / len(text) for nats, text in zip(score.log_likelihood, row.choices, strict=True)]) == row.gold
            for row, score in zip(rows, scored, strict=True)
        )
    return TaskScore(task.name, tuple(row.id for row in rows), plain, normalised, task.normalised)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])


def _question(tokenizer: Any, row: TaskRow) -> Question:
    context = row.text.rstrip()
    if context.startswith("Question:") and not context.endswith("Answer:"):
        context += "\nAnswer:"
    prompt = tuple(tokenizer(context)["input_ids"])
    # Tokenised together and cut, because tokenizers that mark the beginning of a text would mark the choice's too.
    choices = [tuple(tokenizer(f"{context} {choice}")["input_ids"])[len(prompt) :] for choice in row.choices]
    if not prompt or not all(choices):
        raise DataError(f"row {row.id}: a text or a choice has no tokens; remove the row")
    return Question(prompt[-MAX_PROMPT:], tuple(choice[:MAX_CHOICE] for choice in choices))


def _batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Yield places of questions with equally many choices and similar lengths, within the budget of tokens."""
    order = sorted(range(len(questions)), key=lambda place: (len(questions[place].choices), _size(questions[place])))
    batch: list[int] = []
    for place in order:
        same = batch and len(questions[batch[0]].choices) == len(questions[place].choices)
        if batch and (not same or (len(batch) + 1) * _size(questions[place]) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _size(question: Question) -> int:
    """Return how many tokens a question adds to a batch, its padded choices included."""
    return len(question.prompt) + len(question.choices) * max(map(len, question.choices))


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id or 0
