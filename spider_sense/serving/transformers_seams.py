"""Every place where transformers' own server is taken hold of. Only seams; nothing else here imports
``transformers.cli``.

``Serve`` looks its parts up when it is made, and finds those of this module: one model, which is guarded before the
port opens; engines that know which case belongs to which request; handlers that put the verdict into the answer.
"""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

from spider_sense.errors import ConfigError
from spider_sense.serving.bodies import check_body, check_prompt
from spider_sense.serving.door import THROTTLE, Door, principals_of
from spider_sense.serving.reception import ASK, Ask, Reception
from spider_sense.serving.served import Served, with_verdict
from spider_sense.serving.streams import event_of, line_of

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
    try:
        with seams(served, folder):
            app([source, *given], prog_name="spider-sense serve")
    finally:
        served.close()


@contextmanager
def seams(served: Served, folder: Path) -> Iterator[None]:
    """Let a ``Serve`` that is made meanwhile be guarded."""
    parts: dict[tuple[Any, str], Any] = {
        (model_manager, "ModelManager"): functools.partial(_Models, served, folder),
        (utils, "GenerationState"): functools.partial(_Engines, served),
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


class _Engines(utils.GenerationState):  # type: ignore[misc]
    """Makes the engines that generate."""

    _cb_manager: Any

    def __init__(self, served: Served, cb_config: Any, **options: Any) -> None:
        config = cb_config or ContinuousBatchingConfig()
        # The states of a guard do not lie beside the blocks, so what another request computed would go unseen.
        config.allow_block_sharing = False
        super().__init__(cb_config=config, **options)
        self._served = served
        served.at_close(self.shutdown)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return the engine, made when it is first asked for."""
        if not use_cb and not self._generate_managers:
            self._generate_managers[model_id] = _InTurn(self._served)
        if use_cb and self._cb_manager is None:
            self._cb_manager, self._cb_model_id = _Packed(self._served, self._cb_config), model_id
        return super().get_manager(model_id, use_cb)


class _InTurn(utils.GenerateManager):  # type: ignore[misc]
    """Generates for one request at a time."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Generate for a stream."""
        check_prompt(inputs["input_ids"].tolist())
        judged = _Judged(model, self._served, ASK.get())
        return super().generate_streaming(judged, processor, inputs, *args, **options)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Generate for a whole answer."""
        check_prompt(inputs["input_ids"].tolist())
        judged = _Judged(model, self._served, ASK.get())
        # The thread that generates ends by itself when the client has left; it must find its future alive.
        return await asyncio.shield(super().generate_non_streaming(judged, processor, inputs, *args, **options))


class _Judged:
    """Stands in the model's place for one request, and finds its case; called in the one thread that generates."""

    def __init__(self, model: Any, served: Served, ask: Ask) -> None:
        self._model, self._served, self._ask = model, served, ask

    def generate(self, input_ids: Tensor, streamer: Any = None, **options: Any) -> Tensor:
        """Generate, and let the stream end only when the case is closed.

        Returns:
            [1, K] token ids; a stopped request has all of its refusal, whatever ended it.
        """
        ask, monitor = self._ask, self._served.monitor
        before, passing = monitor.cases, _Passing(streamer, ask)
        try:
            ids = self._model.generate(input_ids, streamer=passing, principals=[ask.principal], **options)
        finally:
            if monitor.cases is not before:
                ask.case = monitor.cases[0]
        rest = self._unsaid(ids.shape[1] - input_ids.shape[1])
        if streamer is not None:
            streamer.put(torch.tensor(rest, dtype=torch.long))
            streamer.end()
        return torch.cat((ids, ids.new_tensor([rest])), 1)

    def _unsaid(self, generated: int) -> list[int]:
        """Return what a stopped request has not said yet of its refusal: it may have ended before, or while it did."""
        assert self._ask.case is not None
        stopped = self._ask.case.stopped_after
        return [] if stopped is None else self._served.ending(begun=stopped > 0)[generated - stopped :]


class _Passing:
    """Hands tokens on while somebody waits for them, and keeps the end of the stream back."""

    def __init__(self, streamer: Any, ask: Ask) -> None:
        self._streamer, self._ask = streamer, ask

    def put(self, value: Tensor) -> None:
        """Take the tokens of a step."""
        if self._ask.left:
            raise utils._GenerationCancelled
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Do nothing: the last verdict is not known yet."""


class _Packed(utils.CBGenerateManager):  # type: ignore[misc]
    """Generates for all requests at once."""

    _cb: Any

    def __init__(self, served: Served, cb_config: Any) -> None:
        super().__init__(cb_config)
        self._served = served

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Start the engine, whose first request says how all of them are sampled."""
        if self._cb is None:
            super().init_cb(model, gen_config)
            batching: Any = self._cb
            batching._generation_loop_body = functools.partial(self._turn, batching._generation_loop_body)
            batching.register_result_handler = functools.partial(self._register, batching.register_result_handler)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, *args: Any, request_id: str, **options: Any
    ) -> Any:
        """Generate for a stream."""
        check_prompt([inputs["input_ids"]])
        ask = ASK.get()
        self._served.senders[request_id] = ask.principal
        started = super().generate_streaming(model, processor, inputs, *args, request_id=request_id, **options)
        ask.on_leave(functools.partial(self._cancel, request_id))
        return started

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, *args: Any, request_id: str, **options: Any
    ) -> Any:
        """Generate for a whole answer."""
        check_prompt([inputs["input_ids"]])
        self._served.senders[request_id] = ASK.get().principal
        try:
            return await super().generate_non_streaming(
                model, processor, inputs, *args, request_id=request_id, **options
            )
        except asyncio.CancelledError:
            self._cancel(request_id)
            raise

    def _cancel(self, name: str) -> None:
        self._cb.cancel_request(name)
        self._served.senders.pop(name, None)

    def _turn(self, original: Callable[..., bool], *args: Any, **options: Any) -> bool:
        """Take a turn of the engine's loop, which goes on while there is nothing to do."""
        goes_on = original(*args, **options)
        self._served.monitor.close_ended()
        return goes_on

    def _register(self, original: Callable[..., None], name: str, callback: Callable[[Any], None]) -> None:
        """Register who is told of a request's tokens, and tell of the last ones what becomes of a stopped request."""
        ask, sent = ASK.get(), 0

        def take(output: Any) -> None:
            nonlocal sent
            if output.is_finished():
                ask.case = self._served.monitor.continuous.get(name)
                output.generated_tokens = self._told(ask, output.generated_tokens, sent)
            sent = len(output.generated_tokens)
            callback(output)

        original(name, take)

    def _told(self, ask: Ask, tokens: list[int], sent: int) -> list[int]:
        """Return the tokens of a request with the refusal in the place of the token that followed the breach."""
        if ask.case is None or ask.case.decision.action != "stop":
            return tokens
        kept = max(sent, len(tokens) - 1)
        return [*tokens[:kept], *self._served.ending(begun=kept > 0)]


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
