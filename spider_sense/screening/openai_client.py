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
        client: an ``openai.OpenAI``, or what has its ``chat.completions.create`` and answers with its types.
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

        Of each message, what was screened is sent and handed on, and nothing else: role, text, calls, name and ids.
        What a model thinks beside its answer (``reasoning_content``), refusals, audio and log probabilities are left
        out.

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
        offered = list(tools or ())
        clean = self._history.take(asked, offered)
        sent = [message.dump() for message in clean]
        if offered:
            options["tools"] = offered
        completion = self._client.chat.completions.create(messages=sent, **options)
        choice, *more = completion.choices
        if more:
            raise DataError("the endpoint gave several answers, though one was asked for; screen another endpoint")
        answer = Message.parse(choice.message.model_dump(), "the answer")
        screened = self._history.take([*asked, answer], offered)[-1]
        shown = screened.dump() | {"content": screened.content or None}
        completion.choices = [
            type(choice).model_construct(index=choice.index, finish_reason=choice.finish_reason, message=shown)
        ]
        return completion
