"""Attach readers, writers and patchers to the sites of a model, and take every trace of them away again.

They run inside the model's forward pass, so they must be tensor-only; they may be compiled. What happens before and
after a pass (naming the rows, folding the scores) runs outside the compiled graph.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from spider_sense.errors import SpiderSenseError
from spider_sense.forward import Forward, SequenceRows, read_forward
from spider_sense.sites import ResolvedSite, resolve_all
from spider_sense.types import Site

__all__ = ["Attachment", "Patcher", "Reader", "Writer"]

Reader = Callable[[Tensor], None]
"""Takes hidden states [..., D] at a site."""
Writer = Callable[[Tensor], Tensor]
"""Takes hidden states [..., D] at a site and returns what flows on; it sits on outputs only."""
Patcher = Callable[[Tensor, Tensor], None]
"""Takes the whole output [..., F] and the input [..., D] of the projection that has a site, and may change the output
in place, by an op that says so."""


class Attachment:
    """Readers, writers and patchers on one model; use it as a context manager or call ``detach``.

    It registers forward hooks, and while it is attached, wraps the generation step of transformers' continuous batching
    (for rows of packed batches). With a model that was compiled before, compiled code is discarded on both ends
    (``torch.compiler.reset``), because a graph that was traced without hooks would silently run without them.

    Args:
        model: a transformers causal language model, or ``torch.compile`` of one.
        readers: what to call at each site.
        begin: called before each forward pass with its rows.
        end: called after it; if it returns True, the pass runs again with the same arguments, between a ``begin`` and
            an ``end`` of its own, and its output takes the place of the first one.
        writers: what to apply to the output of each site.
        patchers: what to call with the output and input of the projection of each site; readers of that projection see
            its output as it was before.
        release: called after each step of continuous batching, even one that raised, when ``end`` was not called.

    Raises:
        SiteError: if the model has no such site.
    """

    def __init__(
        self,
        model: nn.Module,
        readers: Mapping[Site, Reader],
        begin: Callable[[Forward], None],
        end: Callable[[], bool | None],
        writers: Mapping[Site, Writer] | None = None,
        patchers: Mapping[Site, Patcher] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._model, self._begin, self._end, self._release = model, begin, end, release
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.forward_rows: Callable[[Sequence[Any], Mapping[str, Any]], Forward] = read_forward
        """Names the rows of a forward pass; an engine that knows better puts its own function here."""
        self._packed: Forward | None = None
        self._passes = 0
        inner = getattr(model, "_orig_mod", model)
        # Compiling a model in place puts the hooks of the model itself inside the graph; its compiled entry point is
        # wrapped instead.
        self._compiled_call = getattr(model, "_compiled_call_impl", None)
        writers, patchers = writers or {}, patchers or {}
        resolved = {place.site: place for place in resolve_all(model, [*readers, *writers, *patchers])}
        for site, reader in readers.items():
            self._handles.append(_hook_reader(resolved[site], reader))
        for site, writer in writers.items():
            self._handles.append(_hook_writer(resolved[site], writer))
        for site, patcher in patchers.items():
            self._handles.append(_hook_patcher(resolved[site], patcher))
        if self._compiled_call is not None:
            model._compiled_call_impl = self._wrap(self._compiled_call)
        else:
            self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._after, with_kwargs=True, prepend=True))
        _continuous.add(inner, self)
        _forget_compiled()

    def detach(self) -> None:
        """Remove everything; calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._compiled_call is not None:
            self._model._compiled_call_impl = self._compiled_call
            self._compiled_call = None
        _continuous.discard(getattr(self._model, "_orig_mod", self._model), self)
        _forget_compiled()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._start(args, kwargs)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        # Not the module itself: its other hooks see the output that counts, once.
        return self._run(module.forward, args, kwargs) if self._end() else None

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes += 1
        self._begin(self._packed or self.forward_rows(args, kwargs))

    def _wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: Any, **kwargs: Any) -> object:
            return self._run(call, args, kwargs)

        return run

    def _run(self, call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        while True:
            self._start(args, kwargs)
            output = call(*args, **kwargs)
            if not self._end():
                return output


def _hook_reader(place: ResolvedSite, reader: Reader) -> torch.utils.hooks.RemovableHandle:
    cut = slice(place.start, place.stop)

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reader((output[0] if isinstance(output, tuple) else output)[..., cut])

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        reader(args[0][..., cut])

    if place.reads == "input":
        return place.module.register_forward_pre_hook(on_input)
    return place.module.register_forward_hook(on_output)


def _hook_writer(place: ResolvedSite, writer: Writer) -> torch.utils.hooks.RemovableHandle:
    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (writer(output[0]), *output[1:])
        return writer(output)

    return place.module.register_forward_hook(on_output)


def _hook_patcher(place: ResolvedSite, patcher: Patcher) -> torch.utils.hooks.RemovableHandle:
    def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        patcher(output, args[0])

    return place.module.register_forward_hook(on_output)


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _ContinuousBatching:
    """Tells attachments the rows of each packed batch of transformers' continuous batching.

    The model's own arguments do not name requests; the batch processor's bookkeeping does. Its generation step is
    wrapped while at least one attachment exists.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attached: dict[int, list[Attachment]] = {}
        self._original: Callable[..., None] | None = None

    def add(self, model: nn.Module, attachment: Attachment) -> None:
        with self._lock:
            self._attached.setdefault(id(model), []).append(attachment)
            if self._original is None:
                processor = _processor_class()
                self._original = processor._generation_step
                processor._generation_step = self._wrap(self._original)

    def discard(self, model: nn.Module, attachment: Attachment) -> None:
        with self._lock:
            attached = self._attached.get(id(model), [])
            if attachment in attached:
                attached.remove(attachment)
            if not attached:
                self._attached.pop(id(model), None)
            if not self._attached and self._original is not None:
                _processor_class()._generation_step = self._original
                self._original = None

    def _wrap(self, original: Callable[..., None]) -> Callable[..., None]:
        def step(processor: Any, model: nn.Module) -> None:
            attachments = list(self._attached.get(id(getattr(model, "_orig_mod", model)), []))
            forward = _packed_forward(processor) if attachments else None
            before = [attachment._passes for attachment in attachments]
            for attachment in attachments:
                attachment._packed = forward
            try:
                original(processor, model)
                if any(attachment._passes == passes for attachment, passes in zip(attachments, before, strict=True)):
                    raise SpiderSenseError(
                        "a step of continuous batching ran no hook of the guard, so nobody judged it; make the manager "
                        "after the guard is attached, with ContinuousBatchingConfig(use_cuda_graph=False)"
                    )
            finally:
                for attachment in attachments:
                    attachment._packed = None
                    if attachment._release is not None:
                        attachment._release()

        return step


def _processor_class() -> Any:
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

    return ContinuousBatchProcessor


def _packed_forward(processor: Any) -> Forward:
    batch = processor.inputs_and_outputs
    if hasattr(batch, "io_pairs"):
        batch = batch.io_pairs[batch.current_pair].host_io
    sequences, start = [], 0
    for item in batch.requests_in_batch:
        state, length = item.state, item.query_length
        # The processor has already counted this step's tokens.
        past = state.position_offset - length
        # A request that was preempted carries what it had generated as part of its prompt.
        prompt = state.initial_tokens[: state._true_initial_tokens or None]
        rows = np.arange(start, start + length)
        positions = np.arange(past, past + length)
        runs, withhold = partial(_runs, processor.scheduler, state.request_id), partial(_withhold, item)
        sequences.append(SequenceRows(str(state.request_id), rows, positions, prompt, state, runs, withhold))
        start += length
    return Forward(max(start, batch.num_q_tokens), tuple(sequences), start, 0)


def _runs(scheduler: Any, name: Any) -> bool:
    return name in scheduler.active_requests or name in scheduler.waiting_requests


def _withhold(item: Any) -> None:
    """Let the engine register none of the KV blocks that this pass completes, so that it finds no match for them."""
    # By its own type: a count a layer type, in older releases one count.
    item.complete_blocks = type(item.complete_blocks)()


_continuous = _ContinuousBatching()
