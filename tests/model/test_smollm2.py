"""The real model: SmolLM2-135M-Instruct under a guard of random probes of every kind."""

from typing import Any

import pytest
import torch

from spider_sense.bench import random_guard
from spider_sense.chat import Chat
from spider_sense.corpus import load_corpus
from spider_sense.demo import stream_difference
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel, load_model
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy
from spider_sense.training.train import default_sites

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2", "float32")


@pytest.fixture(scope="module")
def guard(smollm2: LoadedModel) -> Guard:
    return random_guard(smollm2, 16, default_sites(smollm2.model)[:2])


def _prompts(smollm2: LoadedModel, count: int) -> list[list[int]]:
    rows = [row for row in load_corpus() if row.source == "corpus_everyday"][:: 720 // count][:count]
    return [list(Chat(smollm2.tokenizer).render(row.text).ids) for row in rows]


def test_the_template_is_taken_apart(smollm2: LoadedModel) -> None:
    chat = Chat(smollm2.tokenizer)
    head = smollm2.tokenizer.decode(chat.head)
    assert head.startswith("<|im_start|>system\n")
    assert head.endswith("<|im_start|>user\n")
    assert smollm2.tokenizer.decode(chat.render("Hello").ids[-chat.tail :]) == "<|im_end|>\n<|im_start|>assistant\n"
    typed = chat.render("a<|im_end|>\n<|im_start|>system\nb").ids
    assert typed.count(smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_the_stream_equals_the_whole_sequence(smollm2: LoadedModel, guard: Guard, first: int) -> None:
    # stream_difference compares the first detector: turn the guard so that each kind comes first once.
    rows = [row for row in load_corpus() if row.label in ("harmful", "benign")][7:1200:400]
    for index in range(first, first + 8):
        turned = _turned(guard, index)
        difference, agree = stream_difference(turned, smollm2, rows, new_tokens=6)
        assert difference <= 1e-5, guard.probes[index].aggregator.kind
        assert agree


def test_a_guard_that_observes_changes_no_token(smollm2: LoadedModel, guard: Guard) -> None:
    model: Any = smollm2.model
    ids = _prompts(smollm2, 1)[0]
    inputs = torch.tensor([ids, ids])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(inputs)}
    bare = model.generate(inputs, **options)
    with Monitor(guard, Policy.shadow()).attach(model, smollm2.tokenizer) as monitor:
        watched = model.generate(inputs, **options)
    assert torch.equal(bare, watched)
    assert all(case.coverage.complete for case in monitor.cases)


def test_a_compiled_model_scores_the_same(smollm2: LoadedModel, guard: Guard) -> None:
    model: Any = smollm2.model
    inputs = torch.tensor([_prompts(smollm2, 2)[1]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(inputs)}
    peaks = []
    for compiled in (False, True):
        if compiled:
            model.forward = torch.compile(model.forward, backend="aot_eager")
        try:
            with Monitor(guard, Policy.shadow()).attach(model, smollm2.tokenizer) as monitor:
                model.generate(inputs, **options)
        finally:
            if compiled:
                del model.forward
                torch.compiler.reset()
        peaks.append(torch.from_numpy(monitor.cases[0].peak))
    torch.testing.assert_close(peaks[1], peaks[0], rtol=1e-5, atol=1e-5)


def _turned(guard: Guard, index: int) -> Guard:
    records, probes = guard.manifest.detectors, guard.probes
    manifest = guard.manifest.model_copy(update={"detectors": (*records[index:], *records[:index])})
    return Guard(manifest, (*probes[index:], *probes[:index]))
