"""Tier 0: rules that need no calibration.

A **logit sweep** steals the output matrix (Carlini et al. 2024, Finlayson et al. 2024): requests with logit biases, or
that name or allow a few tokens, read logits of ever others. Rank r takes r different tokens and r squared logits, even
where the matrix of prompts by tokens has gaps that low rank completes, so R logits of D different tokens have assembled
at most ``min(D, sqrt(R))``. Evenly spread they reach ``R / D``, but a sweep can touch many tokens once and read few of
them often. A quarter of the model's width is what must not be reached; as it is acted on at half of that, answers may
be four times as long as they are counted.

Shape letters: N principals.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.counting import distinct
from spider_sense.extraction.layout import States

__all__ = ["Rules"]

SHARE = 1 / 8
"""Of the model's width: the rank at which a sweep is acted on."""
SHORT = 4
"""Generated tokens up to which a biased request is a reading, not an answer."""
MANY = 1000
"""Distinct biased ids that no set of class labels has, if the answers are short."""
MANY_LONG = 4 * MANY
"""The same whatever the answers' length."""
HITS, HIT_SHARE = 16, 0.5
"""Known-list hits, and their share of a principal's requests, that are worth a look."""
UNSEEN = 16
"""Requests from which missing activations are worth a look."""
_BLIND, _LISTED, _SWEEPING, _SWEPT = 1, 2, 4, 8
"""Bits of what the rules found."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules for one model."""

    width: int
    """Of the hidden state: the rank of the output matrix."""

    def judge(self, states_N: States) -> NDArray[np.int64]:
        """Return the level of each principal, [N]: 0 nothing, 1 watch, 3 act."""
        return self.levels(self.found(states_N))

    @staticmethod
    def levels(found_N: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the level of what is found of each principal, [N]."""
        return np.where(found_N & _SWEPT, 3, (found_N > 0).astype(np.int64))

    def found(self, states_N: States) -> NDArray[np.uint8]:
        """Return a bit for each thing that the rules find, [N]."""
        half_N, whole_N = self._sweeps(states_N)
        bits = {
            _BLIND: self._unseen(states_N),
            _LISTED: self._hits(states_N),
            _SWEEPING: half_N,
            _SWEPT: whole_N,
        }
        result: NDArray[np.uint8] = sum((np.uint8(bit) * is_N for bit, is_N in bits.items()), np.zeros(1, np.uint8))
        return result

    def evidence(self, states_N: States, row: int) -> tuple[str, ...]:
        """Say in words what the rules found of one principal."""
        one = states_N[row : row + 1]
        words = []
        if self._sweeps(one)[0, 0]:
            ids_1 = distinct(one["biased_ids"])
            words.append(
                f"{int(one['biased_requests'][0])} requests that biased, named or allowed about {ids_1[0]:.0f} "
                f"different tokens showed up to {int(one['revealed'][0])} logits: a rank of up to "
                f"{_rank(one, ids_1)[0]:.0f} of {self.width}"
            )
        if self._hits(one)[0]:
            hits = int(one["list_hits"].max())
            words.append(f"{hits} of {int(one['count'][0])} requests stand in one known query list")
        if self._unseen(one)[0]:
            words.append(f"activations of {int(one['sketched'][0])} of {int(one['count'][0])} requests were seen")
        return tuple(words)

    def _sweeps(self, states_N: States) -> NDArray[np.bool_]:
        """Return where half of what a sweep takes has been seen, and where all of it, [2, N].

        A fixed set of labels is none, however often it is asked: a sweep biases at least twice as many tokens as its
        widest request.
        """
        rows = np.flatnonzero(states_N["biased_requests"])
        result = np.zeros((2, len(states_N)), dtype=np.bool_)
        if len(rows):
            biased = states_N[rows]
            ids = distinct(biased["biased_ids"])
            moving, rank = ids > 2 * biased["widest_bias"].astype(np.float64), _rank(biased, ids)
            most = np.where(_median_is_short(biased), MANY, MANY_LONG)
            for place, part in enumerate((0.5, 1.0)):
                result[place, rows] = (ids > part * most) | (moving & (rank >= part * SHARE * self.width))
        return result

    def _hits(self, states_N: States) -> NDArray[np.bool_]:
        hits = states_N["list_hits"].max(axis=1)
        result: NDArray[np.bool_] = (hits >= HITS) & (hits >= HIT_SHARE * states_N["count"])
        return result

    def _unseen(self, states_N: States) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = (states_N["count"] >= UNSEEN) & (2 * states_N["sketched"] < states_N["count"])
        return result


def _rank(states_N: States, ids_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank that can have been assembled at most of so many different tokens, [N]."""
    result: NDArray[np.float64] = np.minimum(ids_N, np.sqrt(states_N["revealed"]))
    return result


def _median_is_short(states_N: States) -> NDArray[np.bool_]:
    """Whether at least half of the biased requests asked for at most ``SHORT`` tokens, [N].

    Column c of the histogram holds limits of bit length c; 4 has three bits, as have 5 to 7.
    """
    short = states_N["max_tokens"][:, : SHORT.bit_length() + 1].sum(axis=1, dtype=np.int64)
    result: NDArray[np.bool_] = 2 * short >= states_N["biased_requests"]
    return result
