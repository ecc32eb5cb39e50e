"""An agent loop behind a screen: a client of an OpenAI-compatible endpoint that sends and hands on what was screened.

client = ScreenedClient(openai.OpenAI(base_url=...), screen)
client.chat.completions.create(model=..., messages=..., tools=...)  # as before
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from spider_sense.errors import ConfigError, DataError
from spider_sense.screening.history import Approve, History
from spider_sense.screening.message import Message
from spider_sense.screening.screen import Screen
from spider_sense.screening.verdict import Screening

__all__ = ["ScreenedClient"]


class ScreenedClient:
    """Stands in for ``openai.OpenAI`` in one conversation of an agent.

    What the loop sends is screened before the endpoint sees it, and what the endpoint answers before the loop does: a
    rejected call never reaches whoever would run it.

    Args:
        client: whatever has ``chat.completions.create``, such as ``openai.OpenAI``.
        screen: decides.
        principal: whose agent it is.
        approve: asks a person about a call that needs one; without it such a call is rejected.
    """

    def __init__(
        self, client: Any, screen: Screen, principal: str | None = None, approve: Approve | None = None
    ) -> None:
        self._client, self._history = client, History(screen, principal, approve)
        self.chat = SimpleNamespace(completions=self)

    @property
    def screenings(self) -> Sequence[Screening]:
        """All decisions so far, the newest last."""
        return self._history.screenings

    def create(
        self, *, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **options: Any
    ) -> Any:
        """Ask for a completion; the arguments are those of the client.

        Returns:
            The client's completion, its text replaced by a notice where it was sanitised.

        Raises:
            RejectedError: if what is sent or what comes back is rejected; the loop then decides how to go on.
            ConfigError: for a stream, or several choices: what was handed on could not be taken back; and for
                ``functions``, the old form of tools, whose calls stand where nobody screens them.
            DataError: for a message that is not in OpenAI's chat format, or an endpoint that answers otherwise than
                it was asked.
        """
        if options.get("stream") or options.get("n", 1) != 1 or options.get("functions"):
            raise ConfigError("a screened answer comes as a whole and alone; leave out stream, n and functions")
        asked = [Message.parse(message, f"message {place}") for place, message in enumerate(messages)]
        clean = self._history.take(asked, tools)
        sent = [_sent(message, now) for message, now in zip(messages, clean, strict=True)]
        offered = {"tools": list(tools)} if tools else {}
        completion = self._client.chat.completions.create(messages=sent, **offered, **options)
        choice, *more = completion.choices
        if more or getattr(choice.message, "function_call", None) is not None:
            raise DataError("the endpoint gave several answers, or a call in the old form; screen another endpoint")
        answer = Message.parse(choice.message.model_dump(), "the answer")
        screened = self._history.take([*asked, answer], tools)[-1]
        if screened.content != answer.content:
            choice.message.content = screened.content
        return completion


def _sent(original: Mapping[str, Any], screened: Message) -> Mapping[str, Any]:
    """Return a message as the loop wrote it, unless its text was replaced."""
    if Message.parse(original).content == screened.content:
        return {key: value for key, value in original.items() if key != "envelope"}
    return screened.dump()
