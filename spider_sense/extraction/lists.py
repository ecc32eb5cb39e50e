"""Query lists that are known to be used for distillation, kept as MinHash signatures, without their texts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError, MissingExtraError
from spider_sense.extraction.layout import LISTS

if TYPE_CHECKING:
    from datasketch import MinHash

__all__ = ["KnownLists"]

PERMUTATIONS = 64
SIMILAR = 0.7
"""Estimated Jaccard similarity of word triples from which a text stands in a list."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, eq=False)
class KnownLists:
    """Finds texts that stand in a list, reworded a little or not (Broder 1997; datasketch's LSH index)."""

    names: tuple[str, ...]
    """Of the lists."""
    owner_M: NDArray[np.int64]
    """Which list each signature is of."""
    signatures_MH: NDArray[np.uint32]
    """[M, 64]"""
    index: Any

    @classmethod
    def build(cls, lists: Mapping[str, Sequence[str]]) -> "KnownLists":
        """Index the texts of each list.

        Raises:
            DataError: if there are more than 8 lists, or one is empty.
            MissingExtraError: if datasketch is not installed.
        """
        if len(lists) > LISTS:
            raise DataError(f"{len(lists)} known lists; at most {LISTS} are allowed: join some")
        empty = [name for name, texts in lists.items() if not texts]
        if empty:
            raise DataError(f"the known list {empty[0]!r} holds no text; remove it")
        signatures = [_signature(text).hashvalues for texts in lists.values() for text in texts]
        owners = np.repeat(np.arange(len(lists)), [len(texts) for texts in lists.values()])
        return cls.restore(tuple(lists), owners, np.array(signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS))

    @classmethod
    def restore(
        cls, names: tuple[str, ...], owner_M: NDArray[np.int64], signatures_MH: NDArray[np.uint32]
    ) -> "KnownLists":
        """Rebuild the index from stored signatures."""
        index = _datasketch().MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
        for row, signature in enumerate(signatures_MH):
            index.insert(row, _minhash(hashvalues=signature))
        return cls(names, owner_M, signatures_MH, index)

    def find(self, text: str) -> int:
        """Return the index of the list that a text stands in, -1 if none."""
        signature = _signature(text)
        rows = np.array(sorted(self.index.query(signature)), dtype=np.int64)
        alike = (self.signatures_MH[rows] == signature.hashvalues).mean(axis=1)
        return int(self.owner_M[rows[alike.argmax()]]) if len(rows) and alike.max() >= SIMILAR else -1


def _signature(text: str) -> "MinHash":
    words = _WORD.findall(text.lower())
    triples = {" ".join(words[start : start + 3]) for start in range(max(len(words) - 2, 1))}
    signature = _minhash()
    signature.update_batch([triple.encode("utf-8", "surrogatepass") for triple in sorted(triples)])
    return signature


def _minhash(**how: Any) -> "MinHash":
    result: MinHash = _datasketch().MinHash(num_perm=PERMUTATIONS, scheme="affine32", **how)
    return result


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise MissingExtraError("datasketch", "extraction") from error
    return datasketch
