"""Stand-ins for what screening is made of: a reader of words, a sense that knows bad ones, a judge on a socket."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from spider_sense.screening.artifact import Artifact
from spider_sense.screening.message import Message
from spider_sense.screening.sensed import Sensed
from spider_sense.screening.span import Conversation, Span
from spider_sense.screening.stage import Stage
from spider_sense.screening.verdict import Answer, Match, Outcome
from spider_sense.types import Coverage, Verdict, Zone

STAGES: Mapping[str, Stage] = {"user": "query", "assistant": "plan", "tool": "observation"}


class WordReader:
    """Counts words for tokens, and takes the stages from the messages."""

    def read(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        spans, texts, words = list[Span](), list[str](), 0

        def add(text: str, **fields: Any) -> None:
            nonlocal words
            start, words = words, words + len(text.split())
            spans.append(Span(start=start, stop=words, **fields))
            texts.append(text)

        for place, message in enumerate(messages):
            if message.content and message.role in STAGES:
                add(message.content, stage=STAGES[message.role], role=message.role, message=place)
            for number, call in enumerate(message.tool_calls):
                called: dict[str, Any] = {"tool": call.name, "arguments": call.arguments, "call": number}
                add(call.function.arguments, stage="action", role="assistant", message=place, **called)
        return Conversation(ids=tuple(range(words)), spans=tuple(spans), texts=tuple(texts))


@dataclass
class WordSense:
    """Senses words: ``zones`` by what a text contains; and remembers the stages that it was asked about."""

    zones: Mapping[str, Zone] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)

    def sense(self, conversation: Conversation) -> list[Sensed]:
        self.stages = [span.stage for span in conversation.spans]
        return [self._sensed(span, text) for span, text in zip(conversation.spans, conversation.texts, strict=True)]

    def _sensed(self, span: Span, text: str) -> Sensed:
        zone: Zone = next((zone for word, zone in self.zones.items() if word in text), "clear")
        return sensed(zone, tokens=span.stop - span.start)


def sensed(zone: Zone, tokens: int = 1, pooled: Sequence[float] | None = None) -> Sensed:
    """Return what one probe says."""
    verdict = Verdict("drift", 0.0, 1.0, zone, tokens - 1, Coverage(scored=tokens))
    return Sensed(verdicts=(verdict,), pooled_D=None if pooled is None else torch.tensor(pooled))


@dataclass
class FixedMatcher:
    """Signatures that fire on whatever is asked."""

    matches: Sequence[Match] = ()

    def match(self, pooled_D: torch.Tensor) -> Sequence[Match]:
        return self.matches


@dataclass
class FixedJudge:
    """A judge with one answer, which counts its questions; None is one that fails."""

    outcome: Outcome | None = "accept"
    asked: list[Artifact] = field(default_factory=list)

    def ask(self, artifact: Artifact) -> Answer:
        self.asked.append(artifact)
        return Answer(outcome=self.outcome, reason="because", seconds=0.0, prompt_tokens=7, completion_tokens=3)


def artifact(stage: Stage = "observation", text: str = "words", **fields: Any) -> Artifact:
    """Return an artifact of a stage."""
    called: dict[str, Any] = {"tool": "search", "arguments": {}} if stage == "action" else {}
    return Artifact(span=Span(stage=stage, start=0, stop=1, role="tool", message=0, **called), text=text, **fields)


Reply = Callable[[dict[str, Any]], "bytes | Iterator[bytes]"]


@dataclass
class Endpoint:
    """An endpoint on a socket."""

    url: str
    requests: list[dict[str, Any]]
    headers: list[dict[str, str]]


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    """Start an endpoint that answers every request with what ``reply`` makes of it."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply, status: int = 200) -> Endpoint:
        found = Endpoint("", [], [])

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found.requests.append(request)
                found.headers.append(dict(self.headers))
                body = reply(request)
                self.send_response(status)
                self.end_headers()
                try:
                    for chunk in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(chunk)
                        self.wfile.flush()
                except OSError:
                    return  # the client has left

            def log_message(self, *args: Any) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.url = f"http://127.0.0.1:{server.server_port}/v1"
        return found

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(content: Any, finish: str = "stop", **fields: Any) -> bytes:
    """Return the body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    usage = {"prompt_tokens": 120, "completion_tokens": 30}
    return json.dumps({"choices": [choice], "usage": usage} | fields).encode()


def drip(body: bytes, seconds: float) -> Iterator[bytes]:
    """Yield a body byte by byte, so that no single wait is long."""
    for byte in body:
        time.sleep(seconds)
        yield bytes([byte])


class Tools:
    """All of the above, for tests that cannot import their neighbours."""

    WordReader, WordSense, FixedMatcher, FixedJudge = WordReader, WordSense, FixedMatcher, FixedJudge
    sensed, artifact = staticmethod(sensed), staticmethod(artifact)
    completion, drip = staticmethod(completion), staticmethod(drip)


@pytest.fixture
def tools() -> type[Tools]:
    """The stand-ins."""
    return Tools
