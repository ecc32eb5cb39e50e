"""Canaries for a guard: short prompts, the scores of the one scoring path, bands of what rounding does."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from spider_sense.chat import Chat
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.training.canaries import FLOAT32_BAND, PROMPTS, ROUNDINGS, TOKENS, make_canaries


@pytest.fixture
def probes(guards: Any) -> Any:
    return guards.many_probes()


def test_a_few_short_prompts_with_the_scores_of_a_plain_pass(
    probes: Any, guards: Any, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_loaded.tokenizer)
    monkeypatch.setattr(guards, "HEAD", chat.head)
    monkeypatch.setattr(guards, "TAIL", chat.tail)
    canaries = make_canaries(tiny_loaded, probes)
    assert len(canaries.prompts) == PROMPTS
    assert len({canary.tokens for canary in canaries.prompts}) == PROMPTS
    assert max(len(canary.tokens) for canary in canaries.prompts) == TOKENS
    assert canaries.bands == (FLOAT32_BAND,) * len(probes)
    which = guards.guard(tiny_loaded, probes)
    for canary in canaries.prompts:
        want = guards.offline_peak(which, tiny_loaded.model, canary.tokens, len(canary.tokens))
        found = [-np.inf if score is None else score for score in canary.scores]
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-5)


def test_in_16_bits_the_band_is_what_rounding_changes(probes: Any, guards: Any, tiny_loaded: LoadedModel) -> None:
    narrow = LoadedModel(model=deepcopy(tiny_loaded.model).bfloat16(), tokenizer=tiny_loaded.tokenizer, source="narrow")
    wide = LoadedModel(model=deepcopy(narrow.model).float(), tokenizer=tiny_loaded.tokenizer, source="wide")
    before = {name: (value.data_ptr(), value.dtype) for name, value in narrow.model.named_parameters()}
    canaries, exact = make_canaries(narrow, probes), make_canaries(wide, probes)
    assert {name: (value.data_ptr(), value.dtype) for name, value in narrow.model.named_parameters()} == before
    for head, (band, probe) in enumerate(zip(canaries.bands, probes, strict=True)):
        if probe.aggregator.span == "response":
            assert band == FLOAT32_BAND
            continue
        narrow_N = np.array([canary.scores[head] for canary in canaries.prompts], np.float64)
        wide_N = np.array([canary.scores[head] for canary in exact.prompts], np.float64)
        rounding = (np.abs(narrow_N - wide_N) / np.maximum(1.0, np.abs(narrow_N))).max()
        assert rounding > 0
        assert band == pytest.approx(max(FLOAT32_BAND, ROUNDINGS * rounding), rel=1e-3)


def test_training_gives_a_guard_canaries(tiny_run: Any) -> None:
    guard = Guard.from_pretrained(tiny_run.folder)
    assert guard.manifest.canaries == make_canaries(tiny_run.loaded, guard.probes)
