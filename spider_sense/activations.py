"""Captured activations of many conversations, token by token, as training reads them.

Shape letters: N conversations, T stored tokens of all of them, P sites, D width.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from spider_sense.types import Site

__all__ = ["ActivationSet"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationSet:
    """Hidden states divided by their root mean square, of the tokens that are scored.

    The template's constant head is left out: the first stored row of a conversation is the token at ``skip``.
    """

    sites: tuple[Site, ...]
    ids: tuple[str, ...]
    """Names of the conversations, N."""
    hidden: Tensor
    """[T, P, D] float16, all conversations one after the other."""
    starts: np.ndarray
    """First row of each conversation, int64, N + 1 numbers; the last one is T."""
    prompt_rows: np.ndarray
    """How many of a conversation's rows are prompt, int64 [N]; further rows are response."""
    skips: np.ndarray
    """Absolute position of a conversation's first row, int64 [N]."""
    tail: int
    """Last prompt rows that the chat template adds after the user's turn."""

    def rows(self, index: int) -> slice:
        """Return the rows of one conversation in ``hidden``."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def site_index(self, sites: tuple[Site, ...]) -> list[int]:
        """Return the positions of some sites along P."""
        return [self.sites.index(site) for site in sites]
