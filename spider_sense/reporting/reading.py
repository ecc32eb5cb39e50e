"""Reads conversations with a guard the way it serves them, and keeps what every token did.

Each conversation is answered by the model's own ``generate`` under a monitor in shadow mode. One whole-sequence pass
then gives the token logits; its readouts must be those that were streamed.

Shape letters: T tokens that passed through the model, C logit columns, H heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spider_sense.case import Case
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import SpiderSenseError
from spider_sense.greedy import GREEDY
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.offline import whole_logits
from spider_sense.policy import Policy
from spider_sense.reporting.contribution import contributions, meaning
from spider_sense.reporting.pieces import pieces
from spider_sense.reporting.report import Conversation, Token, Track
from spider_sense.scoring import Bank, Probe, Scorer
from spider_sense.scoring.aggregator import SPAN_BITS

__all__ = ["TOLERANCE", "read_conversations"]

TOLERANCE = 1e-4
"""Largest difference of streamed and whole-sequence readouts in float32, divided by max(1, |readout|)."""
MAX_TOKENS = 4096


def read_conversations(
    guard: Guard,
    loaded: LoadedModel,
    examples: Sequence[Example],
    max_new_tokens: int,
    allow_uncertified: bool = False,
    advance: Callable[[], None] | None = None,
) -> tuple[Conversation, ...]:
    """Answer prompts under the guard and read them token by token.

    Args:
        guard: what reads.
        loaded: the model it was made for.
        examples: prompts; a ``response`` is not used, the model writes its own.
        max_new_tokens: longest answer.
        allow_uncertified: accept another serving configuration than the guard was calibrated in.
        advance: called after each conversation.

    Raises:
        MismatchError: if the guard was made for another model.
        SpiderSenseError: if streamed and whole-sequence readouts disagree in float32.
    """
    chat, answered = Chat(loaded.tokenizer), list[tuple[list[int], Case]]()
    monitor = Monitor(guard, Policy.shadow(), keep_history=True)
    with monitor.attach(loaded.model, loaded.tokenizer, allow_uncertified):
        for example in examples:
            prompt = chat.render(example.turns or example.text, MAX_TOKENS).ids
            answered.append((_answer(loaded, prompt, max_new_tokens), monitor.cases[0]))
            if advance is not None:
                advance()
    pairs = zip(examples, answered, strict=True)
    return tuple(_read(guard, loaded, example, ids, case) for example, (ids, case) in pairs)


def _answer(loaded: LoadedModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    model: Any = loaded.model
    ids_1P = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids_1P,
        attention_mask=torch.ones_like(ids_1P),
        max_new_tokens=max_new_tokens,
        pad_token_id=loaded.tokenizer.pad_token_id,
        **GREEDY,
    )
    return list(output[0].tolist())


def _read(guard: Guard, loaded: LoadedModel, example: Example, ids: Sequence[int], case: Case) -> Conversation:
    bank = Bank(guard.probes, loaded.model.device, dtype=loaded.model.dtype)
    logits_TC = whole_logits(bank, loaded, ids[: case.request.position])
    scorer = Scorer(bank)
    request = scorer.open(example.id, case.request.prompt_length, case.request.skip, case.request.tail)
    peak_H, trace_TH = (x.cpu().numpy() for x in scorer.score_sequence(logits_TC, request))
    difference = _difference(case, peak_H, trace_TH)
    if loaded.model.dtype == torch.float32 and not difference <= TOLERANCE:
        raise SpiderSenseError(
            f"{example.id}: streamed and whole-sequence readouts differ by {difference:.2g}, allowed are {TOLERANCE}; "
            "the model computes differently with its cache, so its verdicts cannot be trusted"
        )
    texts = pieces(loaded.tokenizer, ids)
    tracks = [
        _track(probe, case, head, texts, logits_TC[:, bank.columns_of(probe)].cpu(), trace_TH[:, head])
        for head, probe in enumerate(guard.probes)
    ]
    return Conversation(
        name=example.id,
        label=example.label or None,
        skipped=case.request.skip,
        missing=case.request.missing,
        action=Policy.default().decide(case.verdicts).action,
        tracks=tuple(tracks),
        difference=difference,
    )


def _difference(case: Case, peak_H: np.ndarray, trace_TH: np.ndarray) -> float:
    positions = [position for position, _ in case.history]
    streamed = np.concatenate((case.peak, [readout for _, readout in case.history]))
    whole = np.concatenate((peak_H, trace_TH[positions, 0]))
    # Two that are not a number agree: both are a breach.
    gap = np.where(np.isnan(streamed) & np.isnan(whole), 0.0, np.abs(streamed - whole))
    return float(np.max(gap / np.maximum(1.0, np.abs(np.nan_to_num(whole)))))


def _track(probe: Probe, case: Case, head: int, texts: Sequence[str], logits_TC: Tensor, trace_T: np.ndarray) -> Track:
    scored, skip, verdict = len(logits_TC), case.request.skip, case.verdicts[head]
    codes = case.request.codes(np.arange(scored))
    folded = np.flatnonzero(codes & SPAN_BITS[probe.aggregator.span])
    numbers_3T = np.full((3, len(texts)), np.nan)
    logit_n, contribution_n = contributions(probe.aggregator, logits_TC[torch.from_numpy(folded)])
    numbers_3T[0, folded], numbers_3T[1, folded] = logit_n.numpy(), contribution_n.numpy()
    numbers_3T[2, :scored] = trace_T
    tokens = [
        Token(
            text=texts[position],
            position=position,
            response=position >= case.request.prompt_length,
            logit=logit,
            contribution=contribution,
            readout=readout,
        )
        for position in range(skip, len(texts))
        for logit, contribution, readout in [[_number(value) for value in numbers_3T[:, position]]]
    ]
    return Track(
        detector=probe.name,
        meaning=meaning(probe.aggregator),
        zone=verdict.zone,
        peak=verdict.score,
        suspect=float(case.thresholds[0, head]),
        breach=verdict.threshold,
        tokens=tuple(tokens),
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
