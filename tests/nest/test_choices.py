"""Log-likelihoods of continuations against a pass of the whole text, one at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nest.choices import Question, score_questions

QUESTIONS = [
    Question((5, 6, 7, 8, 9), ((10, 11), (12,), (13, 14, 15))),
    Question((20, 21), ((22,), (23, 24, 25, 26), (27, 28))),
    Question((30, 31, 32), ((33,), (34,), (35,))),
]


def plain(model: Any, prompt: tuple[int, ...], choice: tuple[int, ...]) -> tuple[float, bool]:
    with torch.no_grad():
        log = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
    steps = log[len(prompt) - 1 : -1]
    total = sum(float(step[token]) for step, token in zip(steps, choice, strict=True))
    return total, [int(step.argmax()) for step in steps] == list(choice)


def test_a_batch_scores_as_single_texts_do(architecture: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(architecture)
    for question, scored in zip(QUESTIONS, score_questions(model, QUESTIONS, 0), strict=True):
        expected = [plain(model, question.prompt, choice) for choice in question.choices]
        assert scored.log_likelihood == pytest.approx([nats for nats, _ in expected], abs=2e-4)
        assert list(scored.greedy) == [flag for _, flag in expected]


def test_single_tokens_need_no_second_pass(tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("llama"), list[int]()
    forward = model.forward

    def spy(**inputs: Any) -> Any:
        calls.append(1)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    score_questions(model, QUESTIONS[2:], 0)
    assert len(calls) == 1


def test_what_greedy_decoding_writes_is_greedy(tiny_model: Callable[[str], Any]) -> None:
    model, prompt = tiny_model("llama"), (5, 6, 7)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    best, other = tuple(ids[3:]), (*ids[3:5], (ids[5] + 1) % 64)
    assert score_questions(model, [Question(prompt, (best, other))], 0)[0].greedy == (True, False)
