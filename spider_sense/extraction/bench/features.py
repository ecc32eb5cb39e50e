"""Pooled activations of texts, computed once and kept on disk.

A folder a model and site; in it shards, each with the digests of its texts and their vectors. A run that is cut off
loses the shard that it was computing.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel, load_model
from spider_sense.pooling import pooled
from spider_sense.types import Site

__all__ = ["Features", "cached_features"]

Vectors = NDArray[np.float32]

SHARD = 512
"""Texts of a shard: half a minute of one core."""
MAX_TOKENS = 160
"""Of a prompt; a longer one loses tokens from its middle."""


class Features:
    """Vectors of texts that were read.

    Args:
        index: row of each text.
        hidden_ND: their vectors, in that order.
    """

    def __init__(self, index: dict[str, int], hidden_ND: Vectors) -> None:
        self.index, self.hidden_ND = index, hidden_ND


def cached_features(
    model: str, site: Site, texts: Sequence[str], advance: Callable[[int], None] | None = None
) -> Features:
    """Return the features of texts; only those that no run has read are computed.

    The cache lies in ``SPIDER_SENSE_CACHE``, by default in ``~/.cache/spider-sense``.

    Args:
        model: as for ``load_model``; read in float32.
        site: where to read.
        texts: user texts; repeated ones are read once.
        advance: is told how many texts were computed.
    """
    loaded = load_model(model, "float32")
    root = Path(os.environ.get("SPIDER_SENSE_CACHE") or Path.home() / ".cache" / "spider-sense")
    place = root / "extraction" / f"{fingerprint(loaded).weight_digest[:12]}-{site}-{MAX_TOKENS}"
    place.mkdir(parents=True, exist_ok=True)
    wanted = {text: _digest(text) for text in texts}
    known = _known(place, set(wanted.values()))
    missing = [text for text, digest in wanted.items() if digest not in known]
    # Shards of like lengths waste no padding.
    missing.sort(key=lambda text: (len(text), text))
    for first in range(0, len(missing), SHARD):
        known |= _compute(loaded, site, missing[first : first + SHARD], place)
        if advance:
            advance(len(missing[first : first + SHARD]))
    index = {text: row for row, text in enumerate(wanted)}
    return Features(index, np.stack([known[digest] for digest in wanted.values()]))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _known(place: Path, wanted: set[bytes]) -> dict[bytes, Vectors]:
    known = {}
    for path in sorted(place.glob("*.safetensors")):
        shard = load_file(path)
        for row, digest in enumerate(bytes(digest) for digest in shard["digest"]):
            if digest in wanted:
                known[digest] = shard["hidden"][row]
    return known


def _compute(loaded: LoadedModel, site: Site, texts: Sequence[str], place: Path) -> dict[bytes, Vectors]:
    hidden_ND = pooled(loaded, site, texts, max_tokens=MAX_TOKENS, batch_tokens=1024)
    digests = [_digest(text) for text in texts]
    shard = {"digest": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16), "hidden": hidden_ND}
    path = place / f"{hashlib.sha256(b''.join(digests)).hexdigest()[:16]}.safetensors"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(shard, beside)
    beside.replace(path)
    return dict(zip(digests, hidden_ND, strict=True))
