"""Captured conversations as what the probes of the stages are fitted on: one row each, a mean over some tokens.

The mean of linear token logits is the linear logit of the mean, so nothing else is needed of a span.

Shape letters: N conversations, P sites, D width.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.screening.drift import Places

__all__ = ["drift_set", "span_set"]


def span_set(data: ActivationSet, which: Sequence[int], spans: Sequence[slice]) -> ActivationSet:
    """Return the mean of one span of each conversation.

    Args:
        data: the captured conversations.
        which: N of them.
        spans: absolute positions, of each of the N.

    Returns:
        One row a conversation, float32.

    Raises:
        ValueError: if a position was not captured.
    """
    means = [_mean(data, index, span) for index, span in zip(which, spans, strict=True)]
    return _set(data, which, torch.stack(means))


def drift_set(data: ActivationSet, which: Sequence[int], places: Sequence[Places]) -> ActivationSet:
    """Return what opens the assistant's turn after an observation less what opens the one before, means both.

    Args:
        data: the captured conversations.
        which: N of them.
        places: what is compared, of each of the N.

    Returns:
        One row a conversation, float32.

    Raises:
        ValueError: if a position was not captured.
    """
    means = [
        _mean(data, index, after) - _mean(data, index, before)
        for index, (before, after) in zip(which, places, strict=True)
    ]
    return _set(data, which, torch.stack(means))


def _mean(data: ActivationSet, index: int, positions: slice) -> Tensor:
    first = int(data.starts[index]) - int(data.skips[index])
    if positions.start < data.skips[index] or first + positions.stop > data.starts[index + 1]:
        raise ValueError(f"tokens {positions.start} to {positions.stop} of {data.ids[index]} were not captured")
    return data.hidden[first + positions.start : first + positions.stop].float().mean(0)


def _set(data: ActivationSet, which: Sequence[int], mean_NPD: Tensor) -> ActivationSet:
    count = len(mean_NPD)
    return replace(
        data,
        ids=tuple(data.ids[index] for index in which),
        hidden=mean_NPD,
        starts=np.arange(count + 1),
        prompt_rows=np.ones(count, dtype=np.int64),
        skips=np.zeros(count, dtype=np.int64),
        tail=0,
    )
