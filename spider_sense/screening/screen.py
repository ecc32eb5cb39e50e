"""Screening of a conversation, span by span."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spider_sense.errors import SignatureError
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.cascade import Cascade
from spider_sense.screening.envelope import Envelope, Sealer
from spider_sense.screening.leaks import LeakWatch
from spider_sense.screening.message import Message
from spider_sense.screening.protocols import Sense, SpanReader
from spider_sense.screening.sensed import Sensed
from spider_sense.screening.span import Conversation, Span
from spider_sense.screening.verdict import Decider, Screening, StageVerdict
from spider_sense.types import Coverage, Verdict, Zone

__all__ = ["NOTICE", "Screen", "tool_name"]

NOTICE = "[A safety check removed this content. Go on without it.]"
"""What takes the place of a span that is sanitised."""

_READ = ("user", "tool")
Sent = Envelope | SignatureError
"""What a message's envelope says, or why it cannot be believed."""


@dataclass(frozen=True, slots=True)
class _Context:
    """What the spans of one conversation share."""

    messages: Sequence[Message]
    tools: frozenset[str] | None
    principal: str | None
    sent: Mapping[int, Sent]


class Screen:
    """Screens conversations.

    Args:
        reader: renders a conversation as the server does, and finds its stages.
        sense: reads them off the model's activations.
        cascade: decides.
        leaks: whose secrets are looked for in what agents write.
        sealer: opens the envelopes of messages from other agents; without one, a message with an envelope is rejected.
        relayed: whether all that this agent is asked comes from other agents, so that without an envelope a user's
            message is rejected, and so is a system message after the first of another role, and a tool's result that
            answers no call.
    """

    def __init__(
        self,
        reader: SpanReader,
        sense: Sense,
        cascade: Cascade,
        leaks: LeakWatch | None = None,
        sealer: Sealer | None = None,
        relayed: bool = False,
    ) -> None:
        self._reader, self._sense, self._cascade = reader, sense, cascade
        self._leaks, self._sealer, self._relayed = leaks, sealer, relayed

    def check(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        principal: str | None = None,
        since: int = 0,
    ) -> Screening:
        """Screen a conversation.

        Args:
            messages: all of it, in order.
            tools: JSON schemas of the tools that the model was offered; a call of any other is rejected. None if that
                is not known.
            principal: whose agent it is.
            since: messages before this place were screened before, so nothing is decided on them again.

        Returns:
            A verdict for each span from there on.

        Raises:
            ConfigError: if the conversation cannot be rendered.
        """
        if self._relayed:
            messages = _owing(messages)
        sent = self._envelopes(messages, principal)
        conversation = _restaged(self._reader.read(messages, tools or ()), sent)
        sensed = self._sense.sense(conversation)
        offered = None if tools is None else frozenset(map(tool_name, tools))
        context = _Context(messages, offered, principal, sent)
        found = zip(conversation.spans, conversation.texts, sensed, strict=True)
        verdicts = [
            self._decide(span, text, senses, context)
            for span, text, senses in found
            if span.message is None or span.message >= since
        ]
        return Screening(verdicts=tuple(verdicts))

    @staticmethod
    def sanitised(messages: Sequence[Message], screening: Screening) -> list[Message]:
        """Return the messages with a notice in place of what is to be sanitised; the others are as they were."""
        removed = {verdict.artifact.span.message for verdict in screening.verdicts if verdict.outcome == "sanitise"}
        return [
            message.model_copy(update={"content": NOTICE, "envelope": None}) if place in removed else message
            for place, message in enumerate(messages)
        ]

    def _envelopes(self, messages: Sequence[Message], principal: str | None) -> dict[int, Sent]:
        return {
            place: self._opened(message, principal)
            for place, message in enumerate(messages)
            if message.envelope is not None
        }

    def _opened(self, message: Message, principal: str | None) -> Sent:
        if self._relayed and not message.envelope:
            return SignatureError("it carries no envelope, and all that this agent reads must")
        if message.role not in _READ:
            return SignatureError(f"a message of the role {message.role} is not read but written, and carries none")
        if self._sealer is None:
            return SignatureError("it carries an envelope, and there is no key to open it with")
        try:
            return self._sealer.open(message.envelope, message.content, principal)
        except SignatureError as error:
            return error

    def _decide(self, span: Span, text: str, sensed: Sensed, context: _Context) -> StageVerdict:
        sent = context.sent.get(span.message) if span.message is not None else None
        sender = sent.sender if isinstance(sent, Envelope) else None
        purpose = _purpose(context, span)
        artifact = Artifact(span=span, text=text, principal=context.principal, sender=sender, purpose=purpose)
        broken = self._broken(artifact, sent, context)
        if broken is not None:
            return replace(broken, zone=sensed.zone, verdicts=sensed.verdicts)
        return self._cascade.decide(artifact, _as_sent(sensed, sent) if isinstance(sent, Envelope) else sensed)

    def _broken(self, artifact: Artifact, sent: Sent | None, context: _Context) -> StageVerdict | None:
        """Return what is wrong whatever the probes say: a false envelope, a leak, a tool that was never offered."""

        def reject(by: Decider, evidence: str) -> StageVerdict:
            return StageVerdict(artifact=artifact, zone="clear", outcome="reject", decided_by=by, evidence=evidence)

        span = artifact.span
        if isinstance(sent, SignatureError):
            return reject("envelope", str(sent))
        if artifact.stage in ("plan", "action") and self._leaks is not None:
            leaks = self._leaks.find(artifact.principal, _written(artifact))
            if leaks:
                return reject("leak", f"{artifact.principal} tells {'; '.join(map(str, leaks))}")
        offered = context.tools is None or span.tool is None or span.tool in context.tools
        return None if artifact.stage != "action" or offered else reject("rule", "no such tool was offered")


def _owing(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with an empty envelope, which never holds, where another agent's is missing.

    The operator's own words come first, and what a tool of this agent says answers a call of it.
    """
    called: set[str] = set()
    begun = False
    result = []
    for message in messages:
        operators = message.role in ("system", "developer")
        begun = begun or not operators
        called |= {call.id for call in message.tool_calls}
        answers = message.role == "tool" and message.tool_call_id in called
        own = message.role == "assistant" or (operators and not begun) or answers
        result.append(message if own or message.envelope else message.model_copy(update={"envelope": {}}))
    return result


def _restaged(conversation: Conversation, sent: Mapping[int, Sent]) -> Conversation:
    """Return the conversation with what other agents sent as observations."""
    spans = [
        replace(span, stage="observation") if span.message in sent and span.stage == "query" else span
        for span in conversation.spans
    ]
    return replace(conversation, spans=tuple(spans))


def _as_sent(sensed: Sensed, envelope: Envelope) -> Sensed:
    """Return what was sensed, and what the sender's side sensed where that was not clear."""
    if envelope.outcome == "accept" and envelope.zone == "clear":
        return sensed
    zone: Zone = "breach" if envelope.outcome == "reject" else "suspect"
    # Its coverage is empty, so that no look-alike here excuses what was seen there.
    there = Verdict(f"{envelope.sender}'s screening", math.nan, math.nan, zone, -1, Coverage())
    return replace(sensed, verdicts=(*sensed.verdicts, there))


def _purpose(context: _Context, span: Span) -> str:
    """Return what the user asked last before a span; nothing for what the user asks."""
    if span.message is None or span.stage == "query":
        return ""
    asked = [
        message.content
        for place, message in enumerate(context.messages[: span.message])
        if message.role == "user" and place not in context.sent
    ]
    return asked[-1] if asked else ""


def _written(artifact: Artifact) -> str:
    """Return what an agent wrote; of a call also its arguments as they are without JSON's escapes."""
    arguments = artifact.span.arguments
    return artifact.text if arguments is None else f"{artifact.text} {json.dumps(arguments, ensure_ascii=False)}"


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return a tool's name by its schema; the empty name, which no call has, if it has none."""
    match tool:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    return ""
