"""Captured conversations as what the probes of the stages are fitted on.

Shape letters: N conversations, T stored tokens, P sites, D width.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.screening.drift import Places

__all__ = ["drift_set", "span_set"]


def span_set(data: ActivationSet, which: Sequence[int], spans: Sequence[tuple[int, int]]) -> ActivationSet:
    """Return the tokens of one span of each conversation, as if it were the whole.

    Args:
        data: the captured conversations.
        which: N of them.
        spans: first and last plus one, absolute positions, of each of the N.
    """
    rows = [_rows(data, index, slice(*span)) for index, span in zip(which, spans, strict=True)]
    return _set(data, which, rows)


def drift_set(data: ActivationSet, which: Sequence[int], places: Sequence[Places]) -> ActivationSet:
    """Return the differences, token by token, of what opens the assistant's turns after and before an observation.

    Their mean is what the drift probe reads, and a probe of the mean is what is fitted on conversation means.
    """
    rows = [
        _rows(data, index, after).float() - _rows(data, index, before).float()
        for index, (before, after) in zip(which, places, strict=True)
    ]
    return _set(data, which, [row.half() for row in rows])


def _rows(data: ActivationSet, index: int, positions: slice) -> Tensor:
    first = int(data.starts[index]) - int(data.skips[index])
    rows_nPD = data.hidden[first + positions.start : first + positions.stop]
    if positions.start < data.skips[index] or first + positions.stop > data.starts[index + 1]:
        raise ValueError(f"tokens {positions.start} to {positions.stop} of {data.ids[index]} were not captured")
    return rows_nPD


def _set(data: ActivationSet, which: Sequence[int], rows: Sequence[Tensor]) -> ActivationSet:
    lengths = np.array([len(item) for item in rows], dtype=np.int64)
    return replace(
        data,
        ids=tuple(data.ids[index] for index in which),
        hidden=torch.cat(list(rows)),
        starts=np.concatenate(([0], np.cumsum(lengths))),
        prompt_rows=lengths,
        skips=np.zeros(len(lengths), dtype=np.int64),
        tail=0,
    )
