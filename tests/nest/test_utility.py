"""Utility scores against a plain loop over rows and choices."""

import pytest
import torch

from nest.tasks import Task, TaskRow
from nest.utility import score_task
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

TEXTS = ("w1 w2", "w3 w4 w5 w6", "Question: w7 w8", "w9", "w10 w11 w12 w13 w14", "w15 w16")
CHOICES = (
    ("w1 w2 w3", "w4"),
    ("w5", "w6", "w7 w8"),
    ("w9 w10", "w11 w12 w13"),
    ("w14", "w15"),
    ("w16 w17", "w18", "w19"),
    ("w20", "w21 w22 w23 w24"),
)


def task(kind: str = "choice", name: str = "util_copa") -> Task:
    rows = [
        TaskRow(f"row-{number}", text, choices, number % 2)
        for number, (text, choices) in enumerate(zip(TEXTS, CHOICES, strict=True))
    ]
    if kind == "last_word":
        rows = [TaskRow(row.id, row.text, row.choices[:1], 0) for row in rows]
    return Task(name, kind, tuple(rows))  # type: ignore[arg-type]


def log_likelihood(loaded: LoadedModel, text: str, choice: str) -> tuple[float, bool]:
    context = text if not text.startswith("Question:") else f"{text}\nAnswer:"
    begin = loaded.tokenizer(context)["input_ids"]
    ids = loaded.tokenizer(f"{context} {choice}")["input_ids"]
    with torch.no_grad():
        log = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    steps = list(zip(log[len(begin) - 1 : -1], ids[len(begin) :], strict=True))
    return sum(float(step[token]) for step, token in steps), all(int(step.argmax()) == token for step, token in steps)


def test_choices_match_a_plain_loop(tiny_loaded: LoadedModel) -> None:
    found = score_task(tiny_loaded, task())
    for number, row in enumerate(task().rows):
        nats = [log_likelihood(tiny_loaded, row.text, choice)[0] for choice in row.choices]
        per_character = [one / len(choice) for one, choice in zip(nats, row.choices, strict=True)]
        assert found.correct[number] == (nats.index(max(nats)) == row.gold)
        assert found.correct_normalised[number] == (per_character.index(max(per_character)) == row.gold)
    assert found.ids == tuple(row.id for row in task().rows)
    assert 0 < sum(found.correct) < len(found.correct)


def test_the_task_says_which_accuracy_is_its_figure(tiny_loaded: LoadedModel) -> None:
    plain, normalised = score_task(tiny_loaded, task()), score_task(tiny_loaded, task(name="util_hellaswag"))
    assert plain.outcomes == plain.correct
    assert normalised.outcomes == normalised.correct_normalised
    assert plain.correct != plain.correct_normalised


def test_a_last_word_is_right_if_greedy_decoding_writes_it(tiny_loaded: LoadedModel) -> None:
    rows = list(task("last_word").rows)
    with torch.no_grad():
        logits = tiny_loaded.model(torch.tensor([tiny_loaded.tokenizer("w1 w2")["input_ids"]])).logits
    word = tiny_loaded.tokenizer.decode([int(logits[0, -1].argmax())])
    rows[0] = TaskRow("known", "w1 w2", (word,), 0)
    found = score_task(tiny_loaded, Task("util_lambada", "last_word", tuple(rows)))
    expected = [log_likelihood(tiny_loaded, row.text, row.choices[0])[1] for row in rows]
    assert list(found.correct) == expected
    assert found.correct[0]
    assert found.correct == found.correct_normalised


def test_a_limit_gives_a_fixed_part_and_the_same_outcomes(tiny_loaded: LoadedModel) -> None:
    whole, done = score_task(tiny_loaded, task()), list[int]()
    part = score_task(tiny_loaded, task(), limit=3, seed=1, advance=done.append)
    assert part.ids == score_task(tiny_loaded, task(), limit=3, seed=1).ids
    assert len(part.ids) == sum(done) == 3
    outcome = dict(zip(whole.ids, whole.correct, strict=True))
    assert list(part.correct) == [outcome[name] for name in part.ids]


def test_documents_are_not_a_task(tiny_loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="measure perplexity"):
        score_task(tiny_loaded, Task("texts", "documents", ()))


def test_a_choice_without_tokens_is_refused(tiny_loaded: LoadedModel) -> None:
    row = TaskRow("odd", "w1", ("w2", "\n \t"), 0)
    with pytest.raises(DataError, match="row odd"):
        score_task(tiny_loaded, Task("task", "choice", (row,)))
