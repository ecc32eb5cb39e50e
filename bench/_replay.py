"""Traces through the model: what is sensed, what it costs, and what each way of deciding makes of it."""

import time
from typing import Any

import numpy as np
import torch
from _arms import Sighting, arms, summarise
from _traces import BenchTrace

from spider_sense.screening.artifact import Artifact
from spider_sense.screening.cascade import Cascade
from spider_sense.screening.protocols import Judge
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.signature_bank import SignatureBank

__all__ = ["added_share", "compare", "sighted"]


def sighted(reader: ChatSpans, sense: ModelSense, trace: BenchTrace) -> list[Sighting]:
    """Run a trace through the model and return what is sensed of each span."""
    conversation = reader.read(trace.messages)
    seen = []
    for span, text, item in zip(conversation.spans, conversation.texts, sense.sense(conversation), strict=True):
        purpose = "" if span.stage == "query" else trace.messages[0].content
        seen.append(Sighting(trace, Artifact(span=span, text=text, purpose=purpose), item))
    return seen


@torch.inference_mode()
def added_share(
    reader: ChatSpans, sense: ModelSense, bank: SignatureBank, trace: BenchTrace, repeats: int = 7
) -> float:
    """Return the time that screening adds to rendering a trace and the model's pass over it, as a share of these.

    Bare and screened passes alternate, and the fastest of each counts: what else the machine does only ever adds.
    """
    plain, cascade = [message.dump() for message in trace.messages], Cascade(matcher=bank)
    bare, screened = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        sense.run(reader.tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"])
        bare.append(time.perf_counter() - start)
        with sense.attached():
            start = time.perf_counter()
            conversation = reader.read(trace.messages)
            sense.run(conversation.ids)
            found = sense.read(conversation)
            for span, text, item in zip(conversation.spans, conversation.texts, found, strict=True):
                cascade.decide(Artifact(span=span, text=text), item)
            screened.append(time.perf_counter() - start)
    return min(screened) / min(bare) - 1


def compare(
    seen: list[Sighting], bank: SignatureBank, judges: dict[str, Judge], slow: str, asked: int
) -> dict[str, dict[str, Any]]:
    """Let every arm decide.

    Args:
        seen: all spans.
        bank: signatures.
        judges: by name.
        slow: name of a judge that takes seconds; its arms decide on a part of the spans, half of them attacks.
        asked: how many that is.

    Returns:
        By arm, as :func:`_arms.summarise`.
    """
    attacks = [item for item in seen if item.attack]
    benign = [item for item in seen if item.trace.attacked is None]
    part = [*_spread(attacks, asked // 2), *_spread(benign, asked // 2)]
    result = {}
    for name, arm in arms(bank, judges).items():
        of = part if slow in name else seen
        result[name] = summarise(of, [arm(item) for item in of])
    return result


def _spread(items: list[Sighting], count: int) -> list[Sighting]:
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, min(count, len(items)))]
