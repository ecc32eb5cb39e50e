"""Traces through the model: what is sensed, what it costs, and what each way of deciding makes of it."""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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


@torch.inference_mode()
def sighted(reader: ChatSpans, senses: Sequence[ModelSense], trace: BenchTrace) -> list[list[Sighting]]:
    """Run a trace through the model once and return what each sense makes of its spans."""
    conversation = reader.read(trace.messages)
    with ExitStack() as stack:
        for sense in senses:
            stack.enter_context(sense.attached())
        senses[0].run(conversation.ids)
        found = [sense.read(conversation) for sense in senses]
    artifacts = []
    for span, text in zip(conversation.spans, conversation.texts, strict=True):
        purpose = "" if span.stage == "query" else trace.messages[0].content
        artifacts.append(Artifact(span=span, text=text, purpose=purpose))
    return [
        [Sighting(trace, artifact, item) for artifact, item in zip(artifacts, sensed, strict=True)] for sensed in found
    ]


@dataclass(frozen=True, slots=True)
class Timing:
    """What one trace costs, in seconds, several times over; what is timed together was timed one after the other."""

    bare: tuple[float, ...]
    """Rendering, and the pass that the engine makes over the prompt in any case, nothing of it cached."""
    check: tuple[float, ...]
    """`Screen.check`, which makes such a pass of its own: all of it is added in front of an endpoint elsewhere."""

    @property
    def shares(self) -> tuple[float, ...]:
        """What is added each time, as a share of ``bare``, if the engine's own pass is the one that is read."""
        return tuple(check / bare - 1 for bare, check in zip(self.bare, self.check, strict=True))

    @property
    def added(self) -> float:
        """The median of ``shares``: what differs between the times is the machine, and between traces the screen."""
        return float(np.median(self.shares))

    @property
    def fastest(self) -> float:
        """What is added as a share, the fastest of each against one another."""
        return min(self.check) / min(self.bare) - 1


@torch.inference_mode()
def timed(reader: ChatSpans, sense: ModelSense, screen: Screen, trace: BenchTrace, repeats: int) -> Timing:
    """Time a screen as it is shipped; bare and screened passes alternate, and so does which of them comes first."""
    plain = [message.dump() for message in trace.messages]

    def bare() -> None:
        sense.run(reader.tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"])

    def check() -> None:
        screen.check(trace.messages, principal="ann")

    seconds: dict[Callable[[], None], list[float]] = {bare: [], check: []}
    for turn in range(repeats):
        for action in (bare, check) if turn % 2 else (check, bare):
            start = time.perf_counter()
            action()
            seconds[action].append(time.perf_counter() - start)
    return Timing(tuple(seconds[bare]), tuple(seconds[check]))


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
