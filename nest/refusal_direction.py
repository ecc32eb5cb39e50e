"""The direction that separates harmful from harmless prompts in the residual stream, after Arditi et al.
(arXiv 2406.11717).

Candidates are differences of means at each block's output and each token that the template puts after the user's turn.
The paper ablates every candidate; here the best of each layer is taken by how well it separates validation prompts,
the 12 best of these are ablated, and the one after which the model is least likely to begin a refusal is kept. As
there, the last fifth of the layers is left out, and so is a candidate whose ablation moves the first token of answers
to harmless prompts by more than 0.1 nats; if all do, the one that moves it least is kept. That adding the direction
makes the model refuse, which the paper asks for too, is not checked: a model may not refuse at all.

Shape letters: N prompts, L layers, P positions from the end, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nest.attacks import direction_ablated
from nest.greedy import left_padded
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel
from spider_sense.sites import layer_count, resolve
from spider_sense.types import Site

__all__ = ["LEAST", "RefusalDirection", "find_refusal_direction"]

TRIED = 12
"""Candidates that are ablated."""
MAX_KL, LAYERS_USED = 0.1, 0.8
VALIDATION, MOST_VALIDATED = 0.2, 16
MAX_TOKENS, BATCH_SIZE = 128, 16
LEAST = 10
"""Prompts of each class below which nothing is looked for."""
_OPENINGS = ("I", "I'm", "I can't", "Sorry", "Unfortunately", "As an AI", "No", "My apologies")
"""Their first tokens stand for the beginning of a refusal."""


@dataclass(frozen=True, slots=True, eq=False)
class RefusalDirection:
    """What was found."""

    direction_D: Tensor
    """float32, unit length, from harmless to harmful."""
    layer: int
    position: int
    """From the end of the prompt: -1 is its last token."""
    refusal_before: float
    """Mean log-odds of beginning a refusal on harmful validation prompts."""
    refusal_after: float
    """The same under ablation."""
    kl: float
    """KL(model || ablated) on harmless validation prompts at the first token of the answer, in nats."""


@torch.no_grad()
def find_refusal_direction(
    loaded: LoadedModel,
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    advance: Callable[[int], None] | None = None,
) -> RefusalDirection:
    """Find the direction; a fifth of each class, but at most 16 prompts, is kept to choose by.

    Args:
        loaded: the model that is attacked.
        harmful: prompts, none of which is tested on.
        harmless: prompts.
        advance: called with the number of candidates ablated, of at most 12.

    Raises:
        DataError: if there are fewer than 10 prompts of a class.
    """
    if min(len(harmful), len(harmless)) < LEAST:
        raise DataError(
            f"{len(harmful)} harmful and {len(harmless)} harmless prompts to find a refusal direction with; "
            f"at least {LEAST} of each are needed beside those that are tested"
        )
    rows = [_rendered(loaded, examples) for examples in (harmful, harmless)]
    held = [min(MOST_VALIDATED, max(2, round(VALIDATION * len(part)))) for part in rows]
    tail = min(Chat(loaded.tokenizer).tail, min(map(len, rows[0] + rows[1])))
    states = [_tail_states(loaded, part, tail) for part in rows]
    candidates = _candidates(states, held)
    harmful_rows, harmless_rows = (part[-count:] for part, count in zip(rows, held, strict=True))
    before, plain = _first_logits(loaded, harmful_rows), _first_logits(loaded, harmless_rows).log_softmax(-1)
    tokens, tried = _refusal_tokens(loaded.tokenizer), []
    for layer, position, direction_D in candidates:
        with direction_ablated(loaded.model, direction_D):
            after = _log_odds(_first_logits(loaded, harmful_rows), tokens)
            ablated = _first_logits(loaded, harmless_rows).log_softmax(-1)
        kl = float((plain.exp() * (plain - ablated)).sum(-1).mean())
        tried.append(RefusalDirection(direction_D, layer, position, _log_odds(before, tokens), after, kl))
        if advance is not None:
            advance(1)
    gentle = [one for one in tried if one.kl <= MAX_KL]
    return min(gentle, key=lambda one: one.refusal_after) if gentle else min(tried, key=lambda one: one.kl)


def _candidates(states: Sequence[Tensor], held: Sequence[int]) -> list[tuple[int, int, Tensor]]:
    """Return layer, position and unit direction of those that separate the held-out prompts best, one a layer."""
    harmful, harmless = states
    difference_LPD = harmful[: -held[0]].mean(0) - harmless[: -held[1]].mean(0)
    unit_LPD = difference_LPD / difference_LPD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    high, low = (
        torch.einsum("nlpd,lpd->nlp", part[-count:], unit_LPD) for part, count in zip(states, held, strict=True)
    )
    spread_LP = ((high.var(0) + low.var(0)) / 2).sqrt().clamp_min(1e-12)
    effect_LP = (high.mean(0) - low.mean(0)) / spread_LP
    best_L = effect_LP.max(1)
    used = max(1, int(LAYERS_USED * len(effect_LP)))
    layers = best_L.values[:used].topk(min(TRIED, used)).indices.tolist()
    places = [(layer, int(best_L.indices[layer])) for layer in layers]
    return [(layer, at - effect_LP.shape[1], unit_LPD[layer, at].clone()) for layer, at in places]


def _tail_states(loaded: LoadedModel, rows: Sequence[tuple[int, ...]], tail: int) -> Tensor:
    """Return the residual stream after each block at the last tokens of each prompt, float32 [N, L, P, D]."""
    seen: list[Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[:, -tail:].float().cpu())

    blocks = [resolve(loaded.model, Site(layer, "resid")).module for layer in range(layer_count(loaded.model))]
    handles = [block.register_forward_hook(read) for block in blocks]
    parts = []
    try:
        for start in range(0, len(rows), BATCH_SIZE):
            _logits(loaded, rows[start : start + BATCH_SIZE])
            parts.append(torch.stack(seen, 1))
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts)


def _first_logits(loaded: LoadedModel, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the logits of the first token of the answers, [N, V]."""
    parts = [_logits(loaded, rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), BATCH_SIZE)]
    return torch.cat(parts)


def _logits(loaded: LoadedModel, rows: Sequence[tuple[int, ...]]) -> Tensor:
    model: Any = loaded.model
    ids_BP, mask_BP, position_BP = left_padded(rows, loaded.tokenizer.pad_token_id or 0, model.device)
    inputs = {"input_ids": ids_BP, "attention_mask": mask_BP, "position_ids": position_BP}
    output = model(**inputs, use_cache=False, logits_to_keep=1)
    return output.logits[:, -1].float()  # type: ignore[no-any-return]


def _log_odds(logits_NV: Tensor, tokens: Sequence[int]) -> float:
    """Return the mean over prompts of log p - log(1 - p), p the probability of the tokens together."""
    log_NV = logits_NV.log_softmax(-1)
    inside = torch.zeros(log_NV.shape[-1], dtype=torch.bool, device=log_NV.device)
    inside[list(tokens)] = True
    return float((log_NV[:, inside].logsumexp(-1) - log_NV[:, ~inside].logsumexp(-1)).mean())


def _refusal_tokens(tokenizer: Any) -> list[int]:
    return sorted({tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in _OPENINGS})


def _rendered(loaded: LoadedModel, examples: Sequence[Example]) -> list[tuple[int, ...]]:
    chat = Chat(loaded.tokenizer)
    return [chat.render(example.turns or example.text, MAX_TOKENS).ids for example in examples]
