"""Answers, refusals, choices and perplexity of the packaged model."""

import pytest

from nest.answers import generate_answers
from nest.perplexity import score_documents
from nest.refusal import refuses
from nest.tasks import Task, TaskRow
from nest.utility import score_task
from spider_sense.models import LoadedModel, load_model

pytestmark = pytest.mark.model

PROMPTS = ["Name three fruits.", "Write one sentence about the sea, please.", "What is the capital of France?", "Hi!"]
TEXT = "The river runs through the town and under an old bridge. In spring it often floods the meadows."
ROWS = (
    TaskRow("a", "Question: What do plants take in through their roots?", ("Water", "Moonlight"), 0),
    TaskRow("b", "Question: Which animal barks?", ("A table", "A dog"), 1),
    TaskRow("c", "Question: What is ice made of?", ("Frozen water", "Burnt sugar"), 0),
    TaskRow("d", "Question: What do people use to cut bread?", ("A cloud", "A knife"), 1),
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("smollm2", "float32")


def test_the_loop_writes_what_generate_writes(loaded: LoadedModel) -> None:
    answers = generate_answers(loaded, PROMPTS, max_new_tokens=12)
    assert answers == generate_answers(loaded, PROMPTS, max_new_tokens=12, through_generate=True)
    assert "Paris" in answers[2]
    assert not any(map(refuses, answers))


def test_a_prefix_is_continued(loaded: LoadedModel) -> None:
    answer = generate_answers(loaded, ["What is the capital of France?"], max_new_tokens=4, prefix="The capital is")
    assert "Paris" in answer[0]


def test_it_knows_easy_answers(loaded: LoadedModel) -> None:
    assert sum(score_task(loaded, Task("util_arc_easy", "choice", ROWS)).outcomes) >= 3


def test_words_in_order_surprise_less_than_shuffled(loaded: LoadedModel) -> None:
    shuffled = " ".join(sorted(TEXT.split()))
    plain, mixed = (score_documents(loaded, [text]).perplexity().value for text in (TEXT, shuffled))
    assert 5 < 3 * plain < mixed
