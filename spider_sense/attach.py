"""Attach readers, writers and patchers to the sites of a model, and take every trace of them away again.

They run inside the model's forward pass, so they must be tensor-only; they may be compiled. What happens before and
after a pass (naming the rows, folding the scores) runs outside the compiled graph.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from spider_sense.forward import Forward, read_forward
from spider_sense.packed_batches import PACKED_BATCHES
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
        self._model, self._begin, self._end = model, begin, end
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.forward_rows: Callable[[Sequence[Any], Mapping[str, Any]], Forward] = read_forward
        """Names the rows of a forward pass; an engine that knows better puts its own function here."""
        self.packed: Forward | None = None
        """Rows of the step of continuous batching that runs, if one does."""
        self.passes = 0
        """Forward passes that the hooks saw."""
        self.release = release
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
        PACKED_BATCHES.add(inner, self)
        _forget_compiled()

    def detach(self) -> None:
        """Remove everything; calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._compiled_call is not None:
            self._model._compiled_call_impl = self._compiled_call
            self._compiled_call = None
        PACKED_BATCHES.discard(getattr(self._model, "_orig_mod", self._model), self)
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
        self.passes += 1
        self._begin(self.packed or self.forward_rows(args, kwargs))

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
