"""Packed batches of transformers' continuous batching: which request each row of a step belongs to.

The model's own arguments do not name requests; the batch processor's bookkeeping does. Its generation step is wrapped
while at least one model is listened to.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import nn

from spider_sense.errors import SpiderSenseError
from spider_sense.forward import Forward, SequenceRows

__all__ = ["PACKED_BATCHES", "Listener"]


class Listener(Protocol):
    """Whoever is to know the rows of packed batches."""

    packed: Forward | None
    """Set to the rows of each step of the model before it, and to None after it."""
    passes: int
    """Forward passes of the model that it saw."""
    release: Callable[[], None] | None
    """Called after each step, even one that raised."""


class PackedBatches:
    """Tells listeners the rows of each step of their models."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, list[Listener]] = {}
        self._original: Callable[..., None] | None = None

    def add(self, model: nn.Module, listener: Listener) -> None:
        """Tell a listener of a model's steps from now on."""
        with self._lock:
            self._listeners.setdefault(id(model), []).append(listener)
            if self._original is None:
                processor = _processor_class()
                self._original = processor._generation_step
                processor._generation_step = self._wrap(self._original)

    def discard(self, model: nn.Module, listener: Listener) -> None:
        """Tell it no more; calling it twice is harmless."""
        with self._lock:
            listeners = self._listeners.get(id(model), [])
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                self._listeners.pop(id(model), None)
            if not self._listeners and self._original is not None:
                _processor_class()._generation_step = self._original
                self._original = None

    def _wrap(self, original: Callable[..., None]) -> Callable[..., None]:
        def step(processor: Any, model: nn.Module) -> None:
            listeners = list(self._listeners.get(id(getattr(model, "_orig_mod", model)), []))
            forward = _packed_forward(processor) if listeners else None
            before = [listener.passes for listener in listeners]
            for listener in listeners:
                listener.packed = forward
            try:
                original(processor, model)
                # One that stopped listening meanwhile has taken its hooks away.
                still = self._listeners.get(id(getattr(model, "_orig_mod", model)), [])
                if any(one in still and one.passes == passes for one, passes in zip(listeners, before, strict=True)):
                    raise SpiderSenseError(
                        "a step of continuous batching ran no hook of the guard, so nobody judged it; make the manager "
                        "after the guard is attached, with ContinuousBatchingConfig(use_cuda_graph=False)"
                    )
            finally:
                for listener in listeners:
                    listener.packed = None
                    if listener.release is not None:
                        listener.release()

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


PACKED_BATCHES = PackedBatches()
