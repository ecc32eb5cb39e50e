"""Only seams: the engines of transformers' own server, which know here which case belongs to which request.

One of them generates for a request at a time, the other for all at once (continuous batching).
"""

import asyncio
import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.cli.serving import utils

from spider_sense.case import Case
from spider_sense.continuous import check_policy
from spider_sense.serving.bodies import check_prompt, check_room
from spider_sense.serving.reception import ASK, Ask
from spider_sense.serving.served import Served

__all__ = ["Engines"]


_PATIENCE = 30.0
"""Seconds that a server which ends waits for the token that it generates."""


class Engines(utils.GenerationState):  # type: ignore[misc]
    """Makes the engines that generate."""

    _cb_manager: Any

    def __init__(self, served: Served, cb_config: Any, **options: Any) -> None:
        if options.get("continuous_batching"):
            check_policy(served.policy)
        config = cb_config or ContinuousBatchingConfig()
        # The states of a guard do not lie beside the blocks, so what another request computed would go unseen.
        config.allow_block_sharing = False
        # A graph that is replayed runs no hooks.
        config.use_cuda_graph = False
        super().__init__(cb_config=config, **options)
        self._served = served
        served.at_close(self._end)

    def _end(self) -> None:
        self.shutdown()
        for engine in self._generate_managers.values():
            # What nobody waits for ends with its next token, and closes its case.
            engine.submit(int).result(timeout=_PATIENCE)

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
            ids = self._model.generate(
                input_ids, streamer=passing, principals=[ask.principal], request_id=ask.name, **options
            )
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
        """Start the engine, which samples as the model's own configuration says, and wait for its KV cache."""
        if self._cb is None:
            # For all requests alike, so none of the clients' says it.
            config = copy.deepcopy(model.generation_config)
            config.use_cache = False
            super().init_cb(model, config)
            batching: Any = self._cb
            while batching.batch_processor is None and batching.is_running():
                time.sleep(0.01)
            batching._generation_loop_body = functools.partial(self._turn, batching._generation_loop_body)
            batching.register_result_handler = functools.partial(self._register, batching.register_result_handler)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> Any:
        """Generate for a stream."""
        self._admit(inputs["input_ids"], gen_config.max_new_tokens, request_id)
        with self._undone(request_id):
            started = super().generate_streaming(model, processor, inputs, gen_config, request_id, **options)
        ASK.get().on_leave(functools.partial(self._cancel, request_id))
        return started

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """Generate for a whole answer."""
        self._admit(inputs["input_ids"], gen_config.max_new_tokens, request_id)
        with self._undone(request_id):
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

    def _admit(self, prompt: list[int], answer: int | None, name: str) -> None:
        check_prompt([prompt])
        self._check_alive(name)
        check_room(len(prompt), answer, self._cb.batch_processor.cache.max_tokens_read)
        self._served.expect(name, ASK.get().principal)

    @contextmanager
    def _undone(self, name: str) -> Iterator[None]:
        """Leave nothing of a request behind whose client leaves, or that the engine does not take."""
        try:
            yield
        except BaseException:
            self._cancel(name)
            raise

    def _cancel(self, name: str) -> None:
        self._cb.cancel_request(name)
        with self._cb.output_router._lock:
            self._cb.output_router.result_handlers.pop(name, None)

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
            ask.case = self._served.monitor.continuous.get(name)
            if not _judged(ask.case, len(output.generated_tokens)):
                output.generated_tokens, output.error = [], "no guard has judged this answer"
                self._cancel(name)
            elif output.is_finished():
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


def _judged(case: Case | None, generated: int) -> bool:
    """Return whether every token has been judged but the last one, which no pass has been over."""
    if case is None:
        return not generated
    return generated < 2 or case.request.position >= case.request.prompt_length + generated - 1
