"""The one path from logits to a request's score.

Training, evaluation, calibration and every serving engine call ``Scorer.step`` with the logits of packed rows and the
request and position of each: nothing here knows where the hidden states came from. Only screening folds its spans by
itself, all of them at once, with the same op.

Shape letters: T packed rows, C logit columns, H heads, B requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sense_kernels import PROMPT, RESPONSE, TAIL, WATCHED, FoldRows
from spider_sense.scoring.bank import Bank
from spider_sense.scoring.blocks import BlockStates
from spider_sense.scoring.stream import Stream
from spider_sense.types import Coverage

__all__ = ["Request", "RequestRows", "Scorer"]


_RESPONSE_ROW = np.array([RESPONSE | WATCHED])


@dataclass(slots=True)
class Request:
    """One conversation that is being scored."""

    id: str
    slot: int
    prompt_length: int
    """Tokens before the first generated one."""
    skip: int
    """Leading tokens that are never folded: the template's constant head, or the first token of a bare prompt."""
    tail: int
    """Last prompt tokens that the chat template adds after the user's turn."""
    principal: str | None = None
    position: int = 0
    """Absolute position of the next token to fold."""
    scored: int = 0
    cached: int = 0
    missing: int = 0

    @property
    def coverage(self) -> Coverage:
        """What the score rests on."""
        return Coverage(self.scored, self.cached, self.missing)

    @property
    def computed(self) -> int:
        """Tokens so far, whatever is known of them."""
        return self.scored + self.cached + self.missing

    def codes(self, positions: np.ndarray) -> np.ndarray:
        """Return the row code of each absolute position, int64; 0 for a row that is not folded."""
        if len(positions) == 1 and positions[0] >= max(self.skip, self.prompt_length):
            return _RESPONSE_ROW  # decoding, the hot path
        prompt = positions < self.prompt_length
        code = np.where(prompt, PROMPT, RESPONSE)
        code |= np.where(prompt & (positions >= self.prompt_length - self.tail), TAIL, 0)
        code |= np.where(positions >= self.prompt_length - 1, WATCHED, 0)
        return np.where(positions < self.skip, 0, code)


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows of one request in a step."""

    request: Request
    rows: np.ndarray
    """Indices into the packed rows, int64, in token order."""
    positions: np.ndarray
    """Absolute position of each, int64, strictly increasing."""
    blocks: np.ndarray | None = None
    """KV block that each is the last token of, or -1; None of an engine without a prefix cache."""


@dataclass(slots=True)
class Scorer:
    """Streaming scores of many requests over one bank."""

    bank: Bank
    blocks: BlockStates | None = None
    """States of the engine's KV blocks, written by the rows that name one."""
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.stream = Stream(self.bank.table, device=self.bank.device)

    def open(self, id: str, prompt_length: int, skip: int, tail: int, principal: str | None = None) -> Request:  # noqa: A002
        """Start a request; the arguments are the fields of :class:`Request`."""
        return Request(id, self.stream.open(), prompt_length, skip, tail, principal)

    def close(self, request: Request) -> None:
        """Forget a request's state."""
        self.stream.close(request.slot)

    def step(self, logits_TC: Tensor, batch: Sequence[RequestRows], trace: Tensor | None = None) -> None:
        """Fold a step.

        A row whose position was folded before (a preempted request that is computed again) is dropped; a position that
        was passed over counts as missing.

        Args:
            logits_TC: [T, C] float32.
            batch: rows of each request, any order of requests.
            trace: [T, H] float32 or None; receives the readout at each watched row.
        """
        rows, codes, lengths, slots, blocks = [], [], [], [], []
        for item in batch:
            # Positions rise, so what was folded before comes first; so do the rows that are skipped.
            first = int(item.positions.searchsorted(item.request.position))
            positions = item.positions[first:]
            if not len(positions):
                continue
            _account(item.request, positions)
            first += int(positions.searchsorted(item.request.skip))
            if first < len(item.positions):
                rows.append(item.rows[first:])
                codes.append(item.request.codes(item.positions[first:]))
                lengths.append(len(rows[-1]))
                slots.append(item.request.slot)
                blocks.append(np.full(lengths[-1], -1) if item.blocks is None else item.blocks[first:])
        if slots:
            starts = np.concatenate(([0], np.cumsum(lengths)))
            block_R = None if self.blocks is None else np.concatenate(blocks)
            fold = FoldRows(np.concatenate(rows), np.concatenate(codes), starts, np.array(slots), block_R=block_R)
            self._fold(logits_TC, fold, trace)

    def decode(
        self, logits_TC: Tensor, row_B: np.ndarray, requests: Sequence[Request], block_B: np.ndarray | None
    ) -> None:
        """Fold one row of each request, as :meth:`step` would.

        Args:
            logits_TC: [T, C] float32.
            row_B: int64, each request's row.
            requests: each row is the next position of its own, past the prompt and what is skipped.
            block_B: KV block that each row is the last token of, or -1; None of an engine without a prefix cache.
        """
        for request in requests:
            request.scored += 1
            request.position += 1
        start_B = np.arange(len(requests) + 1)
        code_B, slot_B = np.repeat(_RESPONSE_ROW, len(requests)), np.array([request.slot for request in requests])
        self._fold(logits_TC, FoldRows(row_B, code_B, start_B, slot_B, block_R=block_B))

    def _fold(self, logits_TC: Tensor, rows: FoldRows, trace: Tensor | None = None) -> None:
        self.stream.fold(logits_TC, rows, trace, None if self.blocks is None else self.blocks.tables)

    def peak(self, requests: Sequence[Request]) -> Tensor:
        """Return each head's maximum over time [B, H]."""
        return self.stream.peak([request.slot for request in requests])

    def score_sequence(self, logits_TC: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Score a whole conversation at once, as offline evaluation does.

        Args:
            logits_TC: [T, C], rows for positions ``request.position`` onwards.
            request: an open request.

        Returns:
            Peak [H] and the readout after each row [T, H], NaN before the end of the prompt.
        """
        rows = np.arange(len(logits_TC))
        trace = torch.full((len(rows), self.bank.table.heads), torch.nan, device=logits_TC.device)
        self.step(logits_TC, [RequestRows(request, rows, rows + request.position)], trace)
        return self.peak([request])[0], trace


def _account(request: Request, positions: np.ndarray) -> None:
    """Update coverage and the next position."""
    end = int(positions[-1]) + 1
    request.scored += len(positions)
    request.missing += end - request.position - len(positions)
    request.position = end
