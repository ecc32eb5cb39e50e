"""The fixed binary layout of what is kept of one principal.

Everything is numbers and keyed hashes; no text. All states of a population are one structured array, so that N
principals are updated together.

Shape letters: N principals, S sketch, P probes, J directions, B bins.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BINS",
    "CHECKPOINTS",
    "DIRECTIONS",
    "EMPTY_LINK",
    "EVERY",
    "FROZEN",
    "LINK_KINDS",
    "LINK_SLOTS",
    "LISTS",
    "PROBES",
    "SAMPLE",
    "SKETCH",
    "STATE",
    "VERSION",
    "LinkKind",
    "States",
]

VERSION = 4
"""Of the layout; another layout gets another number."""

SKETCH = 64
"""Coordinates of a sketch."""
PROBES = 8
"""Probe logits that a request has room for; the first one is of the probe for all campaigns together."""
DIRECTIONS = PROBES + 2
"""Numbers of a request that the own-history tier watches: probe logits, the sketch's norm, and the share of the
principal's requests that have opened alike."""
BINS = 16
"""Bins of a direction."""
FROZEN = 48
"""Requests after which the frozen baseline is complete."""
CHECKPOINTS = (16, 32, 64, 128, 256, 512, 1024)
"""Numbers of requests at which the level tier looks."""
EVERY = 128
"""Requests between its looks after the last checkpoint."""
SAMPLE = 32
"""Requests of a principal whose sketches and logits are kept, for what linked accounts have in common."""
LISTS = 8
"""Known query lists that hits are counted of."""
LINK_SLOTS = 16
"""Keyed hashes that are kept of each kind of link evidence: the smallest ones, a bottom-k sketch."""
EMPTY_LINK = np.uint64(2**64 - 1)

LinkKind = Literal["payment", "network", "client", "declared", "parameters", "prefix"]
"""payment, network, client: of the account. declared: an identity that the operator says is linked. parameters: the
tuple of sampling parameters. prefix: the system prompt."""
LINK_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)

STATE = np.dtype(
    [
        ("seed", "<u8"),  # keyed hash of the principal: drives every random choice
        ("tenant", "S24"),  # its declared type, in ASCII
        ("first", "<f8"),  # seconds
        ("last", "<f8"),
        ("count", "<u4"),  # requests
        ("sketched", "<u4"),  # requests with activations
        ("probe", "<f4"),  # sum of the first logits, of the probe for all campaigns together
        ("history", "<u4", BINS),  # histogram of the same
        # Own history
        ("recent", "<f4", (DIRECTIONS, BINS)),  # histograms where older requests weigh less
        ("frozen", "u1", (DIRECTIONS, BINS)),  # and of the first requests
        ("bets", "<f4", (2, DIRECTIONS)),  # ln of Shiryaev-Roberts: [recent | frozen, J]
        # Requests drawn from all: their first logits, and their sketches in steps
        ("sample_logits", "<f4", SAMPLE),
        ("sample", "i1", (SAMPLE, SKETCH)),
        # Structure
        ("openings", "<u8", 16),  # Misra-Gries: hashes and counts
        ("opening_counts", "<u4", 16),
        # Rules
        ("biased_ids", "u1", 1024),  # HyperLogLog registers of distinct biased token ids
        ("biased_requests", "<u4"),
        ("widest_bias", "<u4"),  # most ids biased by one request
        ("revealed", "<u8"),  # logits that biased requests can have shown, at most 256 tokens of a choice counted
        ("max_tokens", "<u4", 16),  # histogram of log2(max_tokens) of biased requests
        ("list_hits", "<u4", LISTS),
        # Links: the smallest hashes of each kind, ascending, filled up with EMPTY_LINK
        ("links", "<u8", (len(LINK_KINDS), LINK_SLOTS)),
        # Running maxima of the tiers' statistics, and what was decided
        ("own", "<f8"),
        ("level", "<f8"),
        ("own_at", "<u4"),
        ("level_at", "<u4"),
        # bits of what rules found; highest level decided by own, level, group: 0 none, 1 watch, 2 limit, 3 act
        ("decided", "u1", 4),
    ]
)

States = NDArray[np.void]
"""Structured array [N] of :data:`STATE`."""
