"""What the base model would have said next at every token of its own answers: the anchor that keeps it what it was.

Kept are the likeliest tokens and, as one, all others. The Kullback-Leibler divergence of distributions that were merged
in this way is a lower bound of the whole one (data-processing inequality) and has its minimum at the same place.

Shape letters: N lessons, A tokens of an answer, K kept tokens, V vocabulary.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nest.forward import answer_logits
from nest.lessons import Batch, Lesson, collate

__all__ = ["Reference", "divergence", "keep_references", "kept_references", "read_reference"]

KEPT = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """Next-token distributions along one answer."""

    token_AK: Tensor
    """int64, the likeliest tokens."""
    log_AK: Tensor
    """float32, their log-probabilities."""
    rest_A: Tensor
    """float32, the log-probability of all others together."""


@torch.no_grad()
def read_reference(
    model: nn.Module,
    lessons: Sequence[Lesson],
    pad: int,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> dict[int, Reference]:
    """Run the base model over the answers of all lessons that teach to answer.

    Args:
        model: the model as it is before tuning.
        lessons: all lessons.
        pad: token id of padding.
        batch_size: lessons of a pass.
        advance: called with the number of lessons done.

    Returns:
        By the lesson's place in the list.
    """
    places = [place for place, lesson in enumerate(lessons) if lesson.kind == "answer"]
    places.sort(key=lambda place: len(lessons[place].prompt))
    result = {}
    device = next(model.parameters()).device
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        batch = collate(lessons, chosen, pad, device)
        log_BAV = answer_logits(model, batch).float().log_softmax(-1)
        top_BAK = log_BAV.topk(min(KEPT, log_BAV.shape[-1]), -1)
        rest_BA = _rest(top_BAK.values)
        for row, place in enumerate(chosen):
            length = len(lessons[place].answer)
            parts = (top_BAK.indices[row, :length], top_BAK.values[row, :length], rest_BA[row, :length])
            result[place] = Reference(*(part.cpu().clone() for part in parts))
        if advance is not None:
            advance(len(chosen))
    return result


def keep_references(file: Path, references: Mapping[int, Reference]) -> None:
    """Write what :func:`read_reference` returned, all answers one after the other."""
    rows = list(references.values())
    tensors = {
        "place": torch.tensor(list(references)),
        "length": torch.tensor([len(row.rest_A) for row in rows]),
        "token": torch.cat([row.token_AK for row in rows]).to(torch.int32),
        "log": torch.cat([row.log_AK for row in rows]),
        "rest": torch.cat([row.rest_A for row in rows]),
    }
    # Processes of other machines may write it too.
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, beside)
    beside.replace(file)


def kept_references(file: Path) -> dict[int, Reference]:
    """Read what :func:`keep_references` wrote."""
    tensors = load_file(file)
    lengths = tensors["length"].tolist()
    parts = (tensors[name].split(lengths) for name in ("token", "log", "rest"))
    return {
        place: Reference(token_AK.long(), log_AK, rest_A)
        for place, token_AK, log_AK, rest_A in zip(tensors["place"].tolist(), *parts, strict=True)
    }


def divergence(log_BAV: Tensor, batch: Batch, references: dict[int, Reference]) -> Tensor:
    """Return the sum of KL(base || model) over the answer tokens of the batch that have a reference, in nats.

    Args:
        log_BAV: log-probabilities of the model.
        batch: the lessons that they belong to.
        references: by place; lessons without one are left out.
    """
    rows = [row for row, place in enumerate(batch.index_B) if place in references]
    total = log_BAV.new_zeros(())
    for row in rows:
        one = references[batch.index_B[row]]
        token_AK, base_AK, rest_A = (part.to(log_BAV.device) for part in (one.token_AK, one.log_AK, one.rest_A))
        log_AK = log_BAV[row, : len(rest_A)].gather(-1, token_AK)
        kept = (base_AK.exp() * (base_AK - log_AK)).sum()
        total = total + kept + (rest_A.exp() * (rest_A - _rest(log_AK))).sum()
    return total


def _rest(log_AK: Tensor) -> Tensor:
    """Return the log-probability of everything that is not among the given tokens."""
    tiny = torch.finfo(torch.float32).eps
    return torch.log1p(-log_AK.exp().sum(-1).clamp(max=1 - tiny))
