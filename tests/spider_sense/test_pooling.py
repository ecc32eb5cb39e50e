"""Mean hidden states of prompts: the shared head and the blocks that are left out change nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError
from spider_sense.extraction.sketch import mean_heads
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples
from spider_sense.pooling import pooled
from spider_sense.scoring.bank import EPS
from spider_sense.types import Site

PROMPTS = ["one", "another prompt that is quite a bit longer than the first", "the third one"]


def _plain(loaded: LoadedModel, layer: int, prompt: Any) -> np.ndarray:
    rendered = Chat(loaded.tokenizer).render(prompt)
    with torch.inference_mode():
        states: Any = loaded.model(torch.tensor([rendered.ids]), output_hidden_states=True)
    hidden_nD = states.hidden_states[layer + 1][0, rendered.skip :]
    mean_D: np.ndarray = (hidden_nD * torch.rsqrt(hidden_nD.square().mean(-1, keepdim=True) + EPS)).mean(0).numpy()
    return mean_D


def test_it_is_the_mean_of_the_normalised_states(
    tiny_model: Callable[[str], PreTrainedModel], tiny_loaded: LoadedModel
) -> None:
    for architecture in ("llama", "qwen2", "gemma2"):
        loaded = LoadedModel(
            model=tiny_model(architecture), tokenizer=tiny_loaded.tokenizer, source=f"org/{architecture}"
        )
        seen: list[int] = []
        found = pooled(loaded, Site(0, "resid"), PROMPTS, batch_tokens=64, advance=seen.append)
        expected = np.stack([_plain(loaded, 0, prompt) for prompt in PROMPTS])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert sum(seen) == len(PROMPTS)


def test_it_is_what_the_bank_and_the_fold_read(tiny_loaded: LoadedModel) -> None:
    site, width = Site(1, "resid"), tiny_loaded.model.config.hidden_size
    names = [f"coordinate.{index}" for index in range(width)]
    heads = mean_heads(site, np.eye(width, dtype=np.float32), np.zeros(width, dtype=np.float32), names)
    examples = [Example(id=t, text=t, label="", category="", source="", group="") for t in PROMPTS]
    live = score_examples(tiny_loaded, heads, examples)
    found = pooled(tiny_loaded, site, PROMPTS)
    np.testing.assert_allclose(found, live.peak_NH, rtol=1e-4, atol=1e-5)


def test_a_conversation_with_its_own_system_prompt_is_computed_whole(tiny_loaded: LoadedModel) -> None:
    turns = [("system", "You sell shoes."), ("user", "which size?")]
    found = pooled(tiny_loaded, Site(0, "resid"), ["one", turns])
    np.testing.assert_allclose(found[1], _plain(tiny_loaded, 0, turns), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], _plain(tiny_loaded, 0, "one"), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(tiny_loaded: LoadedModel) -> None:
    blocks = tiny_loaded.model.config.num_hidden_layers
    pooled(tiny_loaded, Site(0, "resid"), ["one"])
    assert tiny_loaded.model.config.num_hidden_layers == blocks > 1


def test_it_refuses_what_it_cannot_read(tiny_loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="at least one"):
        pooled(tiny_loaded, Site(0, "resid"), [])
    with pytest.raises(ConfigError, match="max_tokens is 3"):
        pooled(tiny_loaded, Site(0, "resid"), ["one"], max_tokens=3)
    with torch.no_grad():
        next(tiny_loaded.model.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="prompt 0 is not finite"):
        pooled(tiny_loaded, Site(0, "resid"), ["one"])
