"""Which request and which position each row of a forward pass belongs to.

A forward pass of a transformers model packs rows ``[batch * tokens]``. Rows are named by (key, absolute position) when
they are computed and never re-derived from lengths afterwards; padding has no name.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Forward", "SequenceRows", "padded_rows", "read_forward"]


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """The rows of one sequence in a forward pass."""

    key: Hashable
    """Row of the batch, or request id under continuous batching."""
    rows: np.ndarray
    """Indices into the packed rows, int64."""
    positions: np.ndarray
    """Absolute positions, int64, without gaps; padding is not counted."""
    prompt: Sequence[int] | None = None
    """Token ids of the prompt, where the engine keeps them."""
    handle: Any = None
    """The engine's own record of the request, where it has one."""
    runs: Callable[[], bool] | None = None
    """Whether the engine still knows a request of this id, where it keeps such a record."""
    withhold: Callable[[], None] | None = None
    """Keeps the KV blocks that this pass completes from other requests, where the engine would share them."""

    def since(self, position: int) -> np.ndarray:
        """Return the rows at a position and after it."""
        return self.rows[self.positions >= position]


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass."""

    total: int
    """Packed rows, padding included."""
    sequences: tuple[SequenceRows, ...]
    tokens: int
    """Columns of the batch that are computed in this pass."""
    past: int
    """Columns computed before."""


def padded_rows(mask_BK: np.ndarray, past: int, tokens: int) -> tuple[SequenceRows, ...]:
    """Name the rows of a padded batch.

    Args:
        mask_BK: bool, which of all K columns so far are real tokens; left, right or mixed padding.
        past: columns that the KV cache holds.
        tokens: columns computed now.
    """
    position_BK = np.cumsum(mask_BK, 1) - 1
    result = []
    for index, mask_K in enumerate(mask_BK):
        column = past + np.flatnonzero(mask_K[past : past + tokens])
        result.append(SequenceRows(index, index * tokens + column - past, position_BK[index, column]))
    return tuple(result)


def read_forward(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Forward:
    """Name the rows of a plain call ``model(input_ids, attention_mask=..., past_key_values=...)``.

    Raises:
        TypeError: if the call has no inputs, or more than these by place.
    """
    inputs = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if x is not None), None)
    if not isinstance(inputs, torch.Tensor):
        raise TypeError("the model was called without input_ids or inputs_embeds")
    if len(args) > 1:
        # What comes second differs between architectures, and an overlooked mask would name padding.
        raise TypeError(
            "the model was called with more than its inputs by place; pass attention_mask and others by name"
        )
    batch, tokens = inputs.shape[:2]
    mask = kwargs.get("attention_mask")
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    spread = _spread_mask(mask)
    if spread is not None:
        sequences = _spread_rows(spread, kwargs.get("position_ids"), (batch, tokens), past)
        return Forward(batch * tokens, sequences, tokens, past)
    if isinstance(mask, torch.Tensor):
        mask_BK = mask.cpu().numpy().astype(bool)
        past = max(past, mask_BK.shape[1] - tokens) if cache is not None else 0
        if mask_BK.shape[1] < past + tokens:
            mask_BK = np.concatenate((np.ones((batch, past + tokens - mask_BK.shape[1]), dtype=bool), mask_BK), 1)
    else:
        mask_BK = np.ones((batch, past + tokens), dtype=bool)
    return Forward(batch * tokens, padded_rows(mask_BK, past, tokens), tokens, past)


def _spread_mask(mask: Any) -> torch.Tensor | None:
    """Return a mask of queries against keys [B, 1, Q, K]; ``generate`` makes one a layer type for a static cache."""
    values = mask.values() if isinstance(mask, Mapping) else [mask]
    return next((value for value in values if isinstance(value, torch.Tensor) and value.dim() == 4), None)


def _spread_rows(mask_B1QK: torch.Tensor, ids: Any, shape: tuple[int, int], past: int) -> tuple[SequenceRows, ...]:
    batch, tokens = shape
    # A real token attends to itself, padding does not. A sliding window may have fewer columns than there are tokens.
    first = min(past, mask_B1QK.shape[-1] - tokens)
    own_BQ = mask_B1QK[:, 0, :, first : first + tokens].diagonal(dim1=-2, dim2=-1).expand(batch, tokens)
    real_BQ = (own_BQ if own_BQ.dtype == torch.bool else own_BQ == 0).cpu().numpy()
    ids_BQ = torch.arange(past, past + tokens) if ids is None else ids.cpu()
    position_BQ = ids_BQ.expand(batch, tokens).numpy()
    columns = [np.flatnonzero(real_Q) for real_Q in real_BQ]
    return tuple(SequenceRows(row, row * tokens + q, position_BQ[row, q]) for row, q in enumerate(columns))
