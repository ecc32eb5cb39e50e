"""Scores of whole conversations, through the same bank and the same fold that score live requests.

Shape letters: N conversations, T packed rows, P sites, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.attach import Attachment
from spider_sense.chat import Chat, Rendered
from spider_sense.data import Example
from spider_sense.forward import Forward
from spider_sense.models import LoadedModel
from spider_sense.scoring import Bank, Probe, RequestRows, Scorer

__all__ = ["ScoredSet", "score_activations", "score_examples", "score_rendered", "whole_logits"]


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """Scores of N conversations."""

    peak_NH: np.ndarray
    """Maximum over time from the last prompt token on, float64: the readout there where there is no response."""
    tokens: np.ndarray
    """Tokens of each prompt, int64 [N]."""


def score_activations(probes: Sequence[Probe], data: ActivationSet, which: np.ndarray, chunk: int = 256) -> ScoredSet:
    """Score captured conversations with many probes at once.

    Args:
        probes: H of them.
        data: the captured conversations.
        which: indices of the conversations to score.
        chunk: conversations that are folded together.
    """
    bank = Bank(probes)
    parts = [_score_chunk(bank, data, which[start : start + chunk]) for start in range(0, len(which), chunk)]
    return ScoredSet(np.concatenate(parts), data.skips[which] + data.prompt_rows[which])


def _score_chunk(bank: Bank, data: ActivationSet, which: np.ndarray) -> np.ndarray:
    scorer = Scorer(bank)
    spans = [data.rows(index) for index in which]
    hidden_TPD = torch.cat([data.hidden[span] for span in spans])
    bank.begin(len(hidden_TPD))
    for site in bank.sites:
        bank.tap(site)(hidden_TPD[:, data.sites.index(site)])
    logits_TC = bank.logits(len(hidden_TPD))
    batch, start = [], 0
    for index, span in zip(which, spans, strict=True):
        skip, length = int(data.skips[index]), span.stop - span.start
        request = scorer.open(data.ids[index], skip + int(data.prompt_rows[index]), skip, data.tail)
        request.position = skip
        rows = np.arange(length)
        batch.append(RequestRows(request, rows + start, rows + skip))
        start += length
    return _fold(scorer, logits_TC, batch)


def _fold(scorer: Scorer, logits_TC: Tensor, batch: Sequence[RequestRows]) -> np.ndarray:
    """Return the maxima over time of a batch [B, H], float64."""
    scorer.step(logits_TC, batch)
    peak_BH: np.ndarray = scorer.peak([item.request for item in batch]).double().cpu().numpy()
    return peak_BH


def score_examples(
    loaded: LoadedModel,
    probes: Sequence[Probe],
    examples: Sequence[Example],
    *,
    max_tokens: int = 4096,
    batch_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] | None = None,
) -> ScoredSet:
    """Run the model over prompts and score them, without keeping any activation.

    Args:
        loaded: the model and its tokenizer.
        probes: H of them.
        examples: rendered with the chat template, up to where the model answers.
        max_tokens: longer prompts are cut in the middle.
        batch_tokens: padded tokens of a forward pass.
        dtype: of the hidden states, by default the model's.
        advance: called with the number of prompts that have just been scored.
    """
    chat = Chat(loaded.tokenizer)
    prompts = [chat.render(example.turns or example.text, max_tokens) for example in examples]
    lengths = [len(prompt.ids) for prompt in prompts]
    return score_rendered(loaded, probes, prompts, lengths, batch_tokens=batch_tokens, dtype=dtype, advance=advance)


def score_rendered(
    loaded: LoadedModel,
    probes: Sequence[Probe],
    rendered: Sequence[Rendered],
    prompt_lengths: Sequence[int],
    *,
    batch_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] | None = None,
) -> ScoredSet:
    """Do the same to N conversations of which the tokens are known, answers included.

    Args:
        loaded: the model and its tokenizer.
        probes: H of them.
        rendered: the conversations; their ``ids`` may go on after the prompt.
        prompt_lengths: tokens of each before the first generated one.
        batch_tokens: padded tokens of a forward pass.
        dtype: of the hidden states, by default the model's.
        advance: called with the number of conversations that have just been scored.
    """
    order = sorted(range(len(rendered)), key=lambda index: len(rendered[index].ids))
    bank = Bank(probes, loaded.model.device, dtype=dtype or loaded.model.dtype)
    peak_NH = np.empty((len(rendered), len(probes)))
    seen: list[Forward] = []
    readers = {site: bank.tap(site) for site in bank.sites}

    def begin(forward: Forward) -> None:
        seen[:] = [forward]
        bank.begin(forward.total)

    with Attachment(loaded.model, readers, begin, lambda: None), torch.inference_mode():
        for batch in _batches(order, rendered, batch_tokens):
            _run(loaded, [rendered[index] for index in batch])
            together = [(rendered[index], prompt_lengths[index]) for index in batch]
            peak_NH[batch] = _score_forward(bank, seen[0], together)
            if advance is not None:
                advance(len(batch))
    return ScoredSet(peak_NH, np.array(prompt_lengths))


@torch.inference_mode()
def whole_logits(bank: Bank, loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    """Return the logits [T, C] of one forward pass, without a cache, over a whole conversation."""
    model: Any = loaded.model
    readers = {site: bank.tap(site) for site in bank.sites}
    with Attachment(model, readers, lambda forward: bank.begin(forward.total), lambda: None):
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    return bank.logits(len(ids))


def _batches(order: Sequence[int], prompts: Sequence[Rendered], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        width = len(prompts[index].ids)
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _run(loaded: LoadedModel, prompts: Sequence[Rendered]) -> None:
    model: Any = loaded.model
    width = max(len(prompt.ids) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), loaded.tokenizer.pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        mask_BT[row, : len(prompt.ids)] = 1
    device = model.device
    model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False, logits_to_keep=1)


def _score_forward(bank: Bank, forward: Forward, together: Sequence[tuple[Rendered, int]]) -> np.ndarray:
    scorer = Scorer(bank)
    batch = [
        RequestRows(scorer.open(str(item.key), length, one.skip, one.tail), item.rows, item.positions)
        for item, (one, length) in zip(forward.sequences, together, strict=True)
    ]
    return _fold(scorer, bank.logits(forward.total), batch)
