"""Capture hidden activations of a model, token by token, each with its sequence and absolute position.

    with Capture(model, [Site.parse("resid.12")]) as capture:
        model(**batch)
        for sequence in capture.take():
            sequence.hidden[site]  # [n, D], real tokens only

Shape letters: T packed rows of a forward pass, n tokens of a sequence, D width.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from spider_sense.attach import Attachment, Reader
from spider_sense.errors import SpiderSenseError
from spider_sense.forward import Forward
from spider_sense.types import Site

__all__ = ["Capture", "CapturedSequence"]


Piece = tuple[np.ndarray, dict[Site, Tensor]]
"""Positions and hidden states of one sequence in one forward pass."""


@dataclass(frozen=True, slots=True)
class CapturedSequence:
    """What was captured of one sequence."""

    key: Hashable
    """Row of the batch, or the request id under continuous batching."""
    positions: np.ndarray
    """Absolute positions, int64, ascending, each once."""
    hidden: dict[Site, Tensor]
    """Hidden states [n, D] in the model's dtype, aligned with ``positions``."""


class Capture:
    """Records activations while it is entered.

    Padding is left out. A token that is computed again (a rejected draft, a preempted request) replaces what was
    captured at its position and after.

    Args:
        model: a transformers causal language model; it may be compiled.
        sites: where to read.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self._model, self._sites = model, tuple(sites)
        self._sequences: dict[Hashable, list[Piece]] = {}
        self._forward: Forward | None = None
        self._seen: list[Tensor | None] = [None] * len(self._sites)
        self._attachment: Attachment | None = None

    def __enter__(self) -> Self:
        readers = {site: self._reader(index) for index, site in enumerate(self._sites)}
        self._attachment = Attachment(self._model, readers, self._begin, self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def take(self) -> list[CapturedSequence]:
        """Return the sequences captured since the last call, and start anew."""
        result = [_joined(key, pieces) for key, pieces in self._sequences.items()]
        self._sequences = {}
        return result

    def _reader(self, index: int) -> Reader:
        def read(hidden: Tensor) -> None:
            # The engine may overwrite its activations in place.
            self._seen[index] = hidden.detach().clone()

        return read

    def _begin(self, forward: Forward) -> None:
        self._forward = forward
        self._seen[:] = [None] * len(self._sites)

    def _end(self) -> None:
        assert self._forward is not None
        seen = {site: x.flatten(0, -2) for site, x in zip(self._sites, self._seen, strict=True) if x is not None}
        silent = [str(site) for site in self._sites if site not in seen]
        if silent:
            raise SpiderSenseError(
                f"nothing was captured at {', '.join(silent)}: the hook did not run. If the model was compiled "
                "after the capture began, compile it first, or enter the capture again"
            )
        for sequence in self._forward.sequences:
            if len(sequence.rows):
                rows = torch.from_numpy(sequence.rows)
                fresh = {site: seen_TD[rows.to(seen_TD.device)] for site, seen_TD in seen.items()}
                pieces = self._sequences.setdefault(sequence.key, [])
                _drop_from(pieces, int(sequence.positions[0]))
                pieces.append((sequence.positions, fresh))


def _drop_from(pieces: list[Piece], position: int) -> None:
    """Drop what was captured at a position and after."""
    while pieces and pieces[-1][0][-1] >= position:
        positions, hidden = pieces.pop()
        keep = int(np.searchsorted(positions, position))
        if keep:
            pieces.append((positions[:keep], {site: x_nD[:keep] for site, x_nD in hidden.items()}))


def _joined(key: Hashable, pieces: list[Piece]) -> CapturedSequence:
    hidden = {site: torch.cat([piece[site] for _, piece in pieces]) for site in pieces[0][1]}
    return CapturedSequence(key, np.concatenate([positions for positions, _ in pieces]), hidden)
