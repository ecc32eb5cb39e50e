"""Watching for extraction while a model is served: what is read of every prompt, and where it goes.

Shape letters: B requests, S numbers read of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from spider_sense.extraction.feed import Feed
from spider_sense.extraction.observation import Asked, Observation
from spider_sense.extraction.standing import Standing
from spider_sense.scoring import Probe

__all__ = ["Heard", "Watch"]


@dataclass(frozen=True, slots=True)
class Heard:
    """A request whose prompt has been read."""

    principal: str
    prompt: tuple[int, ...]
    asked: Asked
    whole: bool
    """Whether all of the prompt's tokens were seen."""


class Watch:
    """Connects an engine's judge with a feed.

    Args:
        feed: takes what is read.
        probes: what reads it: a sketch, and the detector's own probes. They are read when the last token of the prompt
            has been folded.
    """

    def __init__(self, feed: Feed, probes: Sequence[Probe]) -> None:
        self.feed, self.probes = feed, tuple(probes)

    def standing(self, principal: str) -> Standing | None:
        """Return how a principal stands, None if nothing is to be said of it."""
        standing = self.feed.standing(principal)
        return None if standing.level == "clear" else standing

    def tell(self, heard: Sequence[Heard], reading_BS: Tensor) -> None:
        """Offer requests to the feed; nothing waits for the device.

        Args:
            heard: B requests whose last prompt token has just been folded.
            reading_BS: what the probes say of them.
        """
        host = reading_BS.to("cpu", non_blocking=True)
        event = None
        if reading_BS.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        for place, request in enumerate(heard):
            reading = partial(_arrived, event, host, place) if request.whole else None
            self.feed.offer(
                Observation(principal=request.principal, prompt=request.prompt, asked=request.asked, reading=reading)
            )


def _arrived(event: Any, host: Tensor, place: int) -> NDArray[Any]:
    if event is not None:
        event.synchronize()
    row: NDArray[Any] = host[place].numpy()
    return row
