"""Perplexity against the model's own loss."""

import math

import pytest
import torch

from nest.perplexity import DocumentScores, score_documents
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w13 w14 w15"]


def test_each_document_gets_its_own_loss(tiny_loaded: LoadedModel) -> None:
    done: list[int] = []
    found = score_documents(tiny_loaded, TEXTS, done.append)
    for text, nats, tokens in zip(TEXTS, found.nats, found.tokens, strict=True):
        ids = torch.tensor([tiny_loaded.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = float(tiny_loaded.model(ids, labels=ids).loss)
        assert tokens == ids.shape[1] - 1
        assert nats == pytest.approx(loss * tokens, abs=1e-4)
    assert sum(done) == len(TEXTS)


def test_documents_weigh_by_their_tokens() -> None:
    scores = DocumentScores(nats=(2.0, 30.0), tokens=(2, 10))
    found = scores.perplexity()
    assert found.value == pytest.approx(math.exp(32 / 12))
    assert (found.low, found.high) == pytest.approx((math.exp(1), math.exp(3)))
    assert found.n == 2


def test_long_documents_are_cut(tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nest.perplexity.MAX_TOKENS", 4)
    assert score_documents(tiny_loaded, TEXTS).tokens == (3, 1, 3, 2)


def test_a_single_token_has_no_perplexity(tiny_loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="document 1 is 'w2', a single token"):
        score_documents(tiny_loaded, ["w1 w2", "w2"])
