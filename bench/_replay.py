"""Traces through the model: what is sensed, what it costs, and what each way of deciding makes of it."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _arms import Sighting, arms, summarise
from _traces import BenchTrace

from spider_sense.config import parse
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.cascade import Cascade
from spider_sense.screening.envelope import Sealer
from spider_sense.screening.keys import OperatorKey
from spider_sense.screening.leaks import LeakWatch
from spider_sense.screening.protocols import Judge
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.screen import Screen
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.screening.tool_policy import ToolPolicy
from spider_sense.screening.tool_rules import ToolRules

__all__ = ["Timing", "compare", "shipped", "sighted", "timed"]

SECRETS = 20


def sighted(reader: ChatSpans, sense: ModelSense, trace: BenchTrace) -> list[Sighting]:
    """Run a trace through the model and return what is sensed of each span."""
    conversation = reader.read(trace.messages)
    seen = []
    for span, text, item in zip(conversation.spans, conversation.texts, sense.sense(conversation), strict=True):
        purpose = "" if span.stage == "query" else trace.messages[0].content
        seen.append(Sighting(trace, Artifact(span=span, text=text, purpose=purpose), item))
    return seen


@dataclass(frozen=True, slots=True)
class Timing:
    """What one trace costs, in seconds, each the fastest of several: what else the machine does only ever adds."""

    bare: float
    """Rendering, and the pass that the engine makes over the prompt in any case, nothing of it cached."""
    check: float
    """`Screen.check`, which makes such a pass of its own: all of it is added in front of an endpoint elsewhere."""

    @property
    def added(self) -> float:
        """What is added, as a share of ``bare``, if the engine's own pass is the one that is read."""
        return self.check / self.bare - 1


@torch.inference_mode()
def timed(reader: ChatSpans, sense: ModelSense, screen: Screen, trace: BenchTrace, repeats: int = 5) -> Timing:
    """Time a screen as it is shipped; bare and screened passes alternate."""
    plain = [message.dump() for message in trace.messages]
    bare, screened = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        sense.run(reader.tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"])
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        screen.check(trace.messages, principal="ann")
        screened.append(time.perf_counter() - start)
    return Timing(min(bare), min(screened))


def shipped(reader: ChatSpans, sense: ModelSense, bank: SignatureBank) -> Screen:
    """Return a screen with every part that needs no model of its own: probes, signatures, rules, leaks, envelopes.

    The rules allow what they do not name, so that no call of a trace waits for a judge.
    """
    key = OperatorKey(secrets.token_bytes(32))
    leaks = LeakWatch(key)
    for place in range(SECRETS):
        leaks.canary("bob", f"canary {place}")
    rules = [
        {"tool": "send_money", "when": {"amount": {"above": 1000}}, "then": "ask"},
        {"tool": "*", "zones": ["breach"], "then": "deny"},
    ]
    policy = parse({"rules": rules, "default": "allow"}, ToolPolicy, "bench")
    return Screen(reader, sense, Cascade(matcher=bank, rules=ToolRules(policy)), leaks, Sealer(key))


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
