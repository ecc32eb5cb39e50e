"""A judge: any endpoint that speaks OpenAI's chat format, the served model itself included.

Asking takes a time limit as a whole, however slowly the bytes come, and reads no more than it must. Trouble of any kind
is an answer without an outcome; what that means is the cascade's to say.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from spider_sense.config import Settings
from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.message import parse_object
from spider_sense.screening.questions import SCHEMA, Question, UnreadableAnswerError, read_answer
from spider_sense.screening.verdict import Answer

__all__ = ["JudgeModel", "JudgeSettings"]

_LARGEST = 256 * 1024
"""Bytes of a response."""


class JudgeSettings(Settings):
    """Where the judge is and what it may cost."""

    url: str
    """Base of the API, such as ``http://127.0.0.1:8000/v1``."""
    model: str = Field(min_length=1)
    key_env: str | None = None
    """Environment variable that holds the API key."""
    seconds: PositiveFloat = 10.0
    """Time limit of a question, from the first byte sent to the last one read."""
    max_tokens: PositiveInt = 200
    """Of an answer."""
    max_characters: PositiveInt = 20_000
    """Longest artifact; a longer one is not asked about, since what is cut off could hold the attack."""
    structured: bool = True
    """Ask the endpoint to hold the answer to a JSON schema; it is read as strictly without."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no http address; write it like http://127.0.0.1:8000/v1")
        return url.rstrip("/")


class JudgeModel:
    """Asks the endpoint; usable from several threads. Close it, or use it in a ``with`` block.

    Args:
        settings: where, and within which limits.

    Raises:
        ConfigError: if the environment variable of the key is not set.
        MissingExtraError: if httpx2 is not installed.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            import anyio.from_thread
            import httpx2
        except ImportError as error:
            raise MissingExtraError("httpx2", "screen") from error
        self.settings = settings
        headers = _headers(settings)
        with ExitStack() as stack:
            # A limit on the whole needs a loop in which the exchange can be cancelled, whoever calls from where.
            self._portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
            self._client = httpx2.AsyncClient(headers=headers, timeout=None)
            stack.callback(self._portal.call, self._client.aclose)
            self._stack = stack.pop_all()

    def ask(self, artifact: Artifact) -> Answer:
        """Judge one artifact; trouble is an answer without an outcome."""
        start = time.perf_counter()
        if len(artifact.text) > self.settings.max_characters:
            return _failed(f"{len(artifact.text)} characters are more than the judge is asked about", start)
        question = Question.about(artifact)
        try:
            reply = self._portal.call(self._exchange, question)
            outcome, reason = read_answer(_content(reply), question.word)
        except UnreadableAnswerError as error:
            return _failed(str(error), start)
        except TimeoutError:
            return _failed(f"no answer within {self.settings.seconds:g} seconds", start)
        except Exception as error:  # whatever goes wrong in between must not open the gate
            return _failed(f"it could not be asked: {type(error).__name__}", start)
        prompt, completion = _usage(reply)
        seconds = time.perf_counter() - start
        return Answer(
            outcome=outcome, reason=reason, seconds=seconds, prompt_tokens=prompt, completion_tokens=completion
        )

    def close(self) -> None:
        """Close the connections."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _exchange(self, question: Question) -> dict[str, Any]:
        import anyio

        body = bytearray()
        with anyio.fail_after(self.settings.seconds):
            url = f"{self.settings.url}/chat/completions"
            async with self._client.stream("POST", url, json=self._request(question)) as response:
                if response.status_code != 200:
                    raise UnreadableAnswerError(f"the endpoint answered with status {response.status_code}")
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _LARGEST:
                        raise UnreadableAnswerError(f"its answer is longer than {_LARGEST} bytes")
        reply = parse_object(body.decode("utf-8", "replace"))
        if reply is None:
            raise UnreadableAnswerError("the endpoint's answer is not one JSON object")
        return reply

    def _request(self, question: Question) -> dict[str, Any]:
        request = {
            "model": self.settings.model,
            "messages": list(question.messages),
            "temperature": 0,
            "max_tokens": self.settings.max_tokens,
        }
        if self.settings.structured:
            schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request


def _headers(settings: JudgeSettings) -> dict[str, str]:
    if settings.key_env is None:
        return {}
    key = os.environ.get(settings.key_env)
    if not key:
        raise ConfigError(f"the environment variable {settings.key_env} holds no key; set it, or leave out key_env")
    return {"Authorization": f"Bearer {key}"}


def _content(reply: Mapping[str, Any]) -> str:
    match reply:
        case {"choices": [{"finish_reason": "stop", "message": {"content": str(content)}}]}:
            return content
        case {"choices": [{"finish_reason": "length"}]}:
            raise UnreadableAnswerError("its answer was cut off; raise max_tokens")
    raise UnreadableAnswerError("the endpoint's answer holds no finished text")


def _usage(reply: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens that were read and written, 0 where the endpoint does not say."""
    match reply.get("usage"):
        case {"prompt_tokens": int(prompt), "completion_tokens": int(completion)}:
            return prompt, completion
    return 0, 0


def _failed(reason: str, start: float) -> Answer:
    return Answer(outcome=None, reason=reason, seconds=time.perf_counter() - start)
