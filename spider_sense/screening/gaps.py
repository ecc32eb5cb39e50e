"""How much of a secret stands in a text in order, in pieces with something else between them.

A word put in after every ten letters leaves no longer run of a secret whole. Its short runs are still there, one behind
the other and not far apart, which those of another text are not.
"""

from collections.abc import Iterable, Sequence

__all__ = ["FAR", "K", "covered"]

K = 4
"""Letters of a run."""
FAR = 40
"""Letters of something else between two runs, at most."""


def covered(found: Iterable[tuple[int, Sequence[int]]]) -> int:
    """Return how many letters of a secret the best chain of its runs covers.

    A run that overlaps the one before it, in the text or in the secret, adds the letters that are new in both.

    Args:
        found: in order, places of the text at which a run of the secret begins, and where in the secret such runs do.
    """
    # By place in the secret of a chain's last run: letters that the chain covers, and where in the text it ends.
    chains: dict[int, tuple[int, int]] = {}
    best = 0
    for place, runs in found:
        chains = {run: chain for run, chain in chains.items() if chain[1] >= place - FAR}
        longest = {
            run: max(
                (held + min(K, run - last, place + K - end) for last, (held, end) in chains.items() if last < run),
                default=K,
            )
            for run in runs
        }
        chains |= {run: (held, place + K) for run, held in longest.items() if held >= chains.get(run, (0, 0))[0]}
        best = max(best, *longest.values())
    return best
