"""Answers: in the order of the prompts, the same one by one and in batches, after the prefix that was asked for."""

import pytest
import torch

from nest.answers import generate_answers
from spider_sense.chat import Chat
from spider_sense.errors import ConfigError
from spider_sense.models import LoadedModel

PROMPTS = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13", "w20 w21 w22 w23"]


@pytest.fixture
def loaded(tiny_loaded: LoadedModel) -> LoadedModel:
    """The tiny model with weights so large that what it writes depends on all of its input."""
    with torch.no_grad():
        for weight in tiny_loaded.model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return tiny_loaded


def test_batches_answer_as_single_prompts_do_in_order(loaded: LoadedModel) -> None:
    alone = [generate_answers(loaded, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert generate_answers(loaded, PROMPTS, max_new_tokens=6, batch_size=2) == alone
    assert generate_answers(loaded, PROMPTS[::-1], max_new_tokens=6, batch_size=3) == alone[::-1]
    assert len(set(alone)) > 1


def test_generate_writes_the_same(loaded: LoadedModel) -> None:
    own = generate_answers(loaded, PROMPTS, max_new_tokens=6)
    assert generate_answers(loaded, PROMPTS, max_new_tokens=6, through_generate=True) == own


def test_the_prefix_is_begun_with_and_not_returned(loaded: LoadedModel) -> None:
    prefix, tokenizer = "w30 w31", loaded.tokenizer
    found = generate_answers(loaded, PROMPTS, max_new_tokens=5, prefix=prefix)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = [*Chat(tokenizer).render(prompt).ids, *tokenizer(prefix)["input_ids"]]
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(ids[-5:], skip_special_tokens=True)
    assert found != generate_answers(loaded, PROMPTS, max_new_tokens=5)


def test_a_conversation_is_rendered_as_one(loaded: LoadedModel) -> None:
    turns = (("user", "w1"), ("assistant", "w2"), ("user", "w3"))
    answers = generate_answers(loaded, [turns, "w3"], max_new_tokens=6)
    assert answers[1] == generate_answers(loaded, ["w3"], max_new_tokens=6)[0]
    assert answers[0] == generate_answers(loaded, [turns], max_new_tokens=6)[0]


def test_progress_counts_prompts(loaded: LoadedModel) -> None:
    done: list[int] = []
    generate_answers(loaded, PROMPTS, max_new_tokens=1, batch_size=2, advance=done.append)
    assert done == [2, 2, 1]


def test_long_prompts_come_in_smaller_batches_on_a_processor(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, whole = Chat(loaded.tokenizer), generate_answers(loaded, PROMPTS, max_new_tokens=6)
    longest = max(len(chat.render(prompt).ids) for prompt in PROMPTS)
    monkeypatch.setattr("nest.answers._CPU_TOKENS", 2 * longest - 1)
    done: list[int] = []
    assert generate_answers(loaded, PROMPTS, max_new_tokens=6, advance=done.append) == whole
    assert max(done) > 1
    assert done[-1] == 1, "the longest has no room beside it"
    assert sum(done) == len(PROMPTS)
    monkeypatch.setattr("nest.answers._CPU_TOKENS", 1)
    done.clear()
    assert generate_answers(loaded, PROMPTS, max_new_tokens=6, advance=done.append) == whole
    assert done == [1] * len(PROMPTS), "a prompt that is longer than a batch comes alone"


def test_no_prompts_no_answers(loaded: LoadedModel) -> None:
    assert generate_answers(loaded, []) == []


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"batch_size": -1}])
def test_bad_numbers_are_refused(loaded: LoadedModel, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        generate_answers(loaded, PROMPTS, **wrong)  # type: ignore[arg-type]
