"""The manifest of a capture, ``capture.json``: what it was made from, which shards are finished, what they hold."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from spider_sense.errors import DataError
from spider_sense.fingerprint import ServingConfig
from spider_sense.folders import Record

__all__ = ["Manifest", "Pins", "ShardEntry", "read_manifest", "resume", "write_manifest"]

MANIFEST = "capture.json"


class Pins(Record):
    """What every shard of a folder has in common."""

    weight_digest: str
    tokenizer_digest: str
    serving: ServingConfig
    sites: tuple[str, ...]
    tail: int


class ShardEntry(Record):
    """One shard."""

    file: str
    sha256: str
    """Of the file."""
    keys: dict[str, str]
    """Names of the conversations in their order, each with the key of what it was captured from."""


class Manifest(Record):
    """What a folder holds, and in which order it is loaded."""

    schema_version: Literal[1] = 1
    pins: Pins
    order: tuple[str, ...]
    shards: tuple[ShardEntry, ...]

    @property
    def done(self) -> frozenset[str]:
        """Names of the conversations that are in a shard."""
        return frozenset(name for entry in self.shards for name in entry.keys)


def resume(folder: Path, pins: Pins, keys: Mapping[str, str]) -> Manifest:
    """Begin or continue a capture: keep the shards that still hold what is asked for, remove all others.

    Args:
        folder: is made if it does not exist.
        pins: of this capture; with other pins no shard is kept.
        keys: name and key of every conversation, in the order to load them in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = read_manifest(folder) if (folder / MANIFEST).exists() else None
    kept = [entry for entry in old.shards if _still_holds(folder, entry, keys)] if old and old.pins == pins else []
    manifest = Manifest(pins=pins, order=tuple(keys), shards=tuple(kept))
    write_manifest(folder, manifest)
    for path in folder.glob("shard-*"):
        if path.name not in {entry.file for entry in kept}:
            path.unlink()
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        DataError: if there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a folder that a capture was written to") from error
    except ValidationError as error:
        raise DataError(f"{path} is damaged or of another version: {error}; delete it and run again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest beside its place and move it there."""
    beside = folder / f"{MANIFEST}.tmp"
    beside.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    os.replace(beside, folder / MANIFEST)


def _still_holds(folder: Path, entry: ShardEntry, keys: Mapping[str, str]) -> bool:
    return (folder / entry.file).exists() and all(keys.get(name) == key for name, key in entry.keys.items())
