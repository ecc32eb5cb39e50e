"""A live patch on the real model: two of eight requests get it, the others keep their bits."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spider_sense.bench import random_guard, random_patch
from spider_sense.case import Case
from spider_sense.chat import Chat
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel, load_model
from spider_sense.monitor import Monitor
from spider_sense.patch import NeuronPatch
from spider_sense.patching import apply_patch
from spider_sense.policy import Patch, Policy, Rule
from spider_sense.training.train import default_sites

pytestmark = pytest.mark.model
NEW, ALPHA = 6, 0.5
PATCHED = (1, 6)
RULES = (Rule(detector="*", zone="suspect", action="patch"),)
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2", "float32")


@pytest.fixture
def inputs(smollm2: LoadedModel) -> dict[str, torch.Tensor]:
    """Eight prompts of one length."""
    words = ("cats", "tea", "rain", "bread", "music", "snow", "chess", "boats")
    chat = Chat(smollm2.tokenizer)
    ids = torch.tensor([chat.render(f"Tell me about {word}.").ids for word in words])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def switched(
    smollm2: LoadedModel, patch: NeuronPatch, ids: torch.Tensor, length: int, start: int
) -> list[torch.Tensor]:
    """Return the logits [B, V] of each step of a plain loop whose weights are patched from a column on."""
    model: Any = smollm2.model
    cache, result = DynamicCache(config=model.config), []
    spans = [(0, length), *((end, end + 1) for end in range(length, length + NEW - 1))]
    with ExitStack() as stack, torch.no_grad():
        for first, last in spans:
            if first == start:
                stack.callback(apply_patch(smollm2, patch, ALPHA).revert)
            mask = torch.ones_like(ids[:, :last])
            result.append(model(ids[:, first:last], attention_mask=mask, past_key_values=cache).logits[:, -1])
    return result


@pytest.fixture
def suspecting(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """A guard that suspects two of the eight, whatever they score."""
    opened = Judge.open

    def open_case(self: Judge, name: str, *args: Any, **kwargs: Any) -> Case:
        case = opened(self, name, *args, **kwargs)
        if name.endswith(tuple(f"-{row}" for row in PATCHED)):
            case.thresholds[0] = -1e9
        return case

    monkeypatch.setattr(Judge, "open", open_case)
    return random_guard(smollm2, 1, default_sites(smollm2.model)[:1])


@pytest.mark.parametrize("begin", ["token", "prompt"])
def test_two_of_eight_are_patched(
    smollm2: LoadedModel, inputs: dict[str, torch.Tensor], suspecting: Guard, begin: Any
) -> None:
    model: Any = smollm2.model
    patch, length = random_patch(smollm2, clusters=2, rows=8, scale=0.02), inputs["input_ids"].shape[1]
    bare = model.generate(**inputs, **OPTIONS)
    policy = Policy(rules=RULES, patch=Patch(alpha=ALPHA, begin=begin))
    monitor = Monitor(suspecting, policy, patch=patch)
    with monitor.attach(model, smollm2.tokenizer):
        found = model.generate(**inputs, **OPTIONS)
    start = {"token": length + 1, "prompt": 0}[begin]
    assert [case.patched_from for case in monitor.cases] == [start if row in PATCHED else None for row in range(8)]
    others = [row for row in range(8) if row not in PATCHED]
    want = switched(smollm2, patch, found.sequences, length, start)
    for step in range(NEW):
        assert torch.equal(found.logits[step][others], bare.logits[step][others])
        for row in PATCHED:
            # Of the largest logit, about 25: thirty layers round sums in another order, and fp32 has 7 digits.
            close = 1e-5 * float(want[step][row].abs().max())
            torch.testing.assert_close(found.logits[step][row], want[step][row], rtol=0.0, atol=close)
            assert torch.equal(found.logits[step][row], bare.logits[step][row]) == (start > length + step - 1)
