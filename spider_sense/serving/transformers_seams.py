"""Only seams: where transformers' own server is taken hold of. Nothing imports ``transformers.cli`` but this and
``transformers_engines``.

``Serve`` looks its parts up when it is made, and finds those of this module: one model, which is guarded before the
port opens; engines that know which case belongs to which request; handlers that put the verdict into the answer.
"""

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

from spider_sense.errors import ConfigError
from spider_sense.serving.bodies import check_body
from spider_sense.serving.door import THROTTLE, Door, principals_of
from spider_sense.serving.reception import ASK, Ask, Reception
from spider_sense.serving.served import Served
from spider_sense.serving.streams import event_of, line_of, with_verdict
from spider_sense.serving.transformers_engines import Engines

__all__ = ["run", "seams"]

OPEN = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/load_model")
"""What can be posted to. Loading loads nothing: it says that the one model is there."""
_ENDS = ('"finish_reason":"', '"type":"response.completed"')
"""What only an event that ends an answer holds: in whatever a model writes quotes are escaped."""


def run(served: Served, source: str, folder: Path, given: Sequence[str]) -> None:
    """Be a guarded server until it is told to end.

    Args:
        served: the guard.
        source: the name that clients call the model by.
        folder: where the model lies.
        given: options of `transformers serve`.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(Serve)
    with seams(served, folder):
        app([source, *given], prog_name="spider-sense serve")


@contextmanager
def seams(served: Served, folder: Path) -> Iterator[None]:
    """Let a ``Serve`` that is made meanwhile be guarded."""
    parts: dict[tuple[Any, str], Any] = {
        (model_manager, "ModelManager"): functools.partial(_Models, served, folder),
        (utils, "GenerationState"): functools.partial(Engines, served),
        (chat_completion, "ChatCompletionHandler"): functools.partial(_Chat, served),
        (completion, "CompletionHandler"): functools.partial(_Completion, served),
        (response, "ResponseHandler"): functools.partial(_Responses, served),
        (server, "build_server"): functools.partial(_build, served, server.build_server),
    }
    before = {place: getattr(*place) for place in parts}
    try:
        for place, part in parts.items():
            setattr(*place, part)
        yield
    finally:
        for place, part in before.items():
            setattr(*place, part)


class _Models(model_manager.ModelManager):  # type: ignore[misc]
    """The one model, loaded and guarded when this is made; there is no other, and it stays."""

    def __init__(self, served: Served, folder: Path, force_model: str, **options: Any) -> None:
        super().__init__(**options)
        if "@" in str(folder):
            raise ConfigError(f"{folder}: transformers' server takes what follows @ for a revision; move the folder")
        self.force_model, self._served = force_model, served
        place = f"{folder}@main"
        self._both = self._load_model(place), self._load_processor(place)
        model, processor = self._both
        served.attach(model, getattr(processor, "tokenizer", processor))

    def process_model_name(self, model_id: str) -> str:
        """Return the name of the model.

        Raises:
            HTTPException: if it is that of another one.
        """
        if model_id != self.force_model:
            raise HTTPException(404, f"the model {model_id!r} is not served; what is: {self.force_model}")
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        self.process_model_name(model_id_and_revision)
        return self._both

    async def load_model_streaming(self, model_id_and_revision: str, **_: Any) -> AsyncIterator[str]:
        """Say that the model is there, as clients ask that load it before they use it."""
        yield line_of({"status": "ready", "model": model_id_and_revision, "cached": True})

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return the one model, as ``/v1/models`` lists it."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]

    def shutdown(self) -> None:
        """End the server's guard; called when the last connection is closed."""
        self._served.close()


class _Answers:
    """What the handlers have in common: nothing goes on that a guard could not see, and the answer says its verdict."""

    def __init__(self, served: Served, **options: Any) -> None:
        super().__init__(**options)
        self._served = served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request under a name of its own."""
        check_body(body)
        ask = ASK.get()
        answer = await super().handle_request(body, ask.name)  # type: ignore[misc]
        if isinstance(answer, JSONResponse):
            return JSONResponse(with_verdict(json.loads(bytes(answer.body)), self._served.verdict(ask.case)))
        answer.body_iterator = self._told(answer.body_iterator, ask)
        return answer

    async def _told(self, lines: AsyncIterator[str], ask: Ask) -> AsyncIterator[str]:
        async for line in lines:
            if any(end in line for end in _ENDS):
                yield line_of(with_verdict(event_of(line), self._served.verdict(ask.case)))
            else:
                yield line


class _Chat(_Answers, chat_completion.ChatCompletionHandler):  # type: ignore[misc]
    """``/v1/chat/completions``."""


class _Completion(_Answers, completion.CompletionHandler):  # type: ignore[misc]
    """``/v1/completions``."""


class _Responses(_Answers, response.ResponseHandler):  # type: ignore[misc]
    """``/v1/responses``."""


def _build(served: Served, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Build the application, with the operator's endpoints and the reception."""
    import prometheus_client

    app = original(*args, **options)

    @app.get("/v1/guard")
    async def guard() -> JSONResponse:
        return JSONResponse(served.front.said)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    app.add_middleware(Reception, open_to=OPEN)
    principals = principals_of(served.settings, served.policy, [])
    if principals is not None:
        setattr(app.state, THROTTLE, served.front.throttle)
        app.add_middleware(Door, principals=principals)
    return app
