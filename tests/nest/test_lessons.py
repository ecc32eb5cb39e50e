"""Lessons, their batches, and the pass over them."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from nest.forward import answer_logits
from nest.lessons import Lesson, batches, collate, make_lessons
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.models import LoadedModel

HEAD = (5, 6, 7, 8, 9)


def lessons(count: int = 6) -> list[Lesson]:
    """Return lessons of several lengths whose prompts share an opening."""
    kinds = ("refuse", "answer")
    return [
        Lesson((*HEAD, *range(10, 12 + i)), tuple(range(20, 22 + (i * 2) % 5)), kinds[i % 2])  # type: ignore[arg-type]
        for i in range(count)
    ]


def example(text: str) -> Example:
    """Return a benign prompt."""
    return Example(id=text, text=text, label="benign", category="", source="s", group=text)


def test_a_lesson_is_the_rendered_prompt_and_the_answer_with_its_end(tiny_loaded: LoadedModel) -> None:
    chat = Chat(tiny_loaded.tokenizer)
    (short, long) = make_lessons(chat, [example("hello"), example("world")], ["yes", "no " * 50], "answer", 99, 6)
    assert short.prompt == chat.render("hello").ids
    assert short.answer[-1] == tiny_loaded.tokenizer.eos_token_id
    assert len(long.answer) == 6
    assert tiny_loaded.tokenizer.eos_token_id not in long.answer


def test_a_batch_aligns_the_answers() -> None:
    batch = collate(lessons(), [0, 3], pad=1)
    assert batch.ids_BX.tolist() == [
        [1, 1, 1, 5, 6, 7, 8, 9, 10, 11, 20, 21, 1],
        [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 21, 22],
    ]
    assert batch.mask_BX.tolist() == [[0] * 3 + [1] * 9 + [0], [1] * 13]
    assert batch.target_BA.tolist() == [[20, 21, -100], [20, 21, 22]]
    assert batch.refuse_B.tolist() == [True, False]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
def test_logits_of_a_batch_are_those_of_each_lesson_alone(
    kind: str, share: bool, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model, rows = tiny_model(kind), lessons()
    with torch.no_grad():
        batch = answer_logits(model, collate(rows, range(6), pad=1), share_head=share)
        for logits_AV, lesson in zip(batch, rows, strict=True):
            ids = torch.tensor([lesson.prompt + lesson.answer])
            want_AV = model(input_ids=ids).logits[0, len(lesson.prompt) - 1 : -1]
            torch.testing.assert_close(logits_AV[: len(lesson.answer)], want_AV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_padding_does_not_use_up_a_sliding_window(kind: str, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model, rows = tiny_model(kind), [Lesson((*HEAD, *range(10, 12 + 6 * i)), (20, 21), "answer") for i in range(4)]
    model.config.sliding_window = 12
    for block in model.model.layers:
        if getattr(block.self_attn, "sliding_window", None) is not None:
            block.self_attn.sliding_window = 12
    with torch.no_grad():
        shared = answer_logits(model, collate(rows, range(4), pad=1))
        apart = answer_logits(model, collate(rows, range(4), pad=1), share_head=False)
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-5)


def test_sharing_the_opening_changes_no_gradient(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    batch = collate(lessons(), range(6), pad=1)
    weight = model.get_input_embeddings().weight
    both = []
    for share in (True, False):
        (gradient,) = torch.autograd.grad(answer_logits(model, batch, share).square().mean(), weight)
        both.append(gradient)
    assert both[0].abs().max() > 0
    torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=1e-4)


def test_the_output_embedding_gets_its_columns_in_one_piece(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model, seen = tiny_model("llama"), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    batch = collate(lessons(), range(6), pad=1)
    for share in (True, False):
        answer_logits(model, batch, share)
    assert seen == [True] * 3, "the shared opening has a pass of its own"
    assert not head._forward_pre_hooks


def test_batches_are_half_refusals_and_a_resumed_run_sees_the_same() -> None:
    rows = lessons(10)
    whole = list(batches(rows, 4, steps=7, seed=1))
    assert list(batches(rows, 4, steps=7, seed=1, start=3)) == whole[3:]
    assert list(batches(rows, 4, steps=7, seed=2)) != whole
    assert all([rows[i].kind for i in chosen] == ["refuse", "answer"] * 2 for chosen in whole)
    refusals = [i for chosen in whole for i in chosen if rows[i].kind == "refuse"]
    assert sorted(refusals[:5]) == [0, 2, 4, 6, 8]  # each once before any again
