"""Perplexity on documents: exp of nats per token over all of them.

Each document stands alone, as plain text. Its first token is predicted by nothing and not counted, unless the tokenizer
puts a beginning token before it.

Shape letters: B documents, X columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nest.finite import check_finite
from nest.intervals import RESAMPLES, Estimate, ratio
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

__all__ = ["DocumentScores", "score_documents"]

MAX_TOKENS = 512
BATCH_TOKENS = 1536
"""Logits that are held at a time: one row of the vocabulary each."""


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """How surprising each document is."""

    nats: tuple[float, ...]
    """Summed over the document's counted tokens."""
    tokens: tuple[int, ...]

    def perplexity(self, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
        """Return the perplexity over all documents, each weighted by its tokens; the interval is over documents."""
        return ratio(self.nats, self.tokens, seed, resamples, exponent=True)


@torch.inference_mode()
def score_documents(
    loaded: LoadedModel, texts: Sequence[str], advance: Callable[[int], None] | None = None
) -> DocumentScores:
    """Score documents.

    Args:
        loaded: the model and its tokenizer.
        texts: documents; of a longer one than 512 tokens the rest is left out.
        advance: called with the number of documents done.

    Raises:
        DataError: if a document has fewer than two tokens, or the model computes what is not a number.
    """
    rows = [loaded.tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    short = next((place for place, row in enumerate(rows) if len(row) < 2), None)
    if short is not None:
        raise DataError(f"document {short} is {texts[short]!r:.40}, a single token; perplexity needs two")
    nats = [0.0] * len(rows)
    for places in _batches(rows):
        for place, value in zip(places, _nats(loaded.model, [rows[place] for place in places]), strict=True):
            nats[place] = value
        if advance is not None:
            advance(len(places))
    return DocumentScores(tuple(nats), tuple(len(row) - 1 for row in rows))


def _nats(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    width, device = max(map(len, rows)), next(model.parameters()).device
    # Padding stands on the right, where causal attention does not see it.
    ids_BX = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask_BX = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids_BX, attention_mask=mask_BX, use_cache=False).logits[:, :-1].float()
    nats_BX = logits.logsumexp(-1) - logits.gather(-1, ids_BX[:, 1:, None])[..., 0]
    nats_B = (nats_BX * mask_BX[:, 1:]).sum(1, dtype=torch.float64)
    check_finite(nats_B, "the log-likelihoods of documents")
    return nats_B.tolist()  # type: ignore[no-any-return]


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        if batch and (len(batch) + 1) * len(rows[place]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
