"""Logs of principals that send numbers and no text, for benches and tests of what stands around the detector."""

import numpy as np

from spider_sense.extraction.rows import Row

__all__ = ["noise_rows"]


def noise_rows(prefix: str, people: int, requests: int, width: int, family: str = "") -> list[Row]:
    """Return requests of made-up principals, each of which scatters around a mean of its own.

    Args:
        prefix: of the principals' names; its length decides the numbers.
        people: principals.
        requests: of each, a minute apart.
        width: of a hidden state.
        family: of the campaign that they all work for, which moves their means by a half.
    """
    draw = np.random.default_rng(len(prefix))
    found = []
    for person in range(people):
        centre = draw.normal(bool(family), 0.3, width)
        for number in range(requests):
            hidden = tuple((0.5 * (centre + draw.normal(0, 1, width))).tolist())
            found.append(Row(principal=f"{prefix} {person}", time=60.0 * number, hidden=hidden, family=family))
    return found
