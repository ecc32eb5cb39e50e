"""Captured activations on disk: safetensors shards of whole conversations.

A shard enters the manifest after it has been moved into place, so what a killed run leaves behind is whole.

Shape letters: N conversations, T stored tokens of all of them, P sites, D width.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.errors import DataError
from spider_sense.folders import sha256
from spider_sense.training.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from spider_sense.types import Site

__all__ = ["CapturedRows", "append", "load", "responses"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapturedRows:
    """What is stored of one conversation."""

    id: str
    key: str
    hidden: Tensor
    """[n, P, D] float16, divided by the root mean square."""
    prompt_rows: int
    skip: int
    response: tuple[int, ...] = ()
    """Token ids that the model generated."""


def append(folder: Path, manifest: Manifest, rows: Sequence[CapturedRows]) -> Manifest:
    """Write a shard and enter it into the manifest."""
    keys = {item.id: item.key for item in rows}
    path = folder / f"shard-{_sha256([manifest.pins.model_dump(), keys])[:16]}.safetensors"
    beside = path.with_suffix(".tmp")
    save_file(_tensors(rows), beside, metadata={"ids": json.dumps(list(keys))})
    entry = ShardEntry(file=path.name, sha256=sha256(beside), keys=keys)
    os.replace(beside, path)
    manifest = manifest.model_copy(update={"shards": (*manifest.shards, entry)})
    write_manifest(folder, manifest)
    return manifest


def load(folder: Path) -> ActivationSet:
    """Read a finished capture, in the order of the examples it was made from.

    Raises:
        DataError: if it is not finished, or a file is damaged.
    """
    manifest = read_manifest(folder)
    if missing := len(set(manifest.order) - manifest.done):
        raise DataError(f"{folder} lacks {missing} of {len(manifest.order)} conversations; run the capture again")
    parts = [_read_lengths(folder, entry) for entry in manifest.shards]
    columns = {name: part[name] for part in parts for name in part}
    rows, prompt_rows, skips = np.array([columns[name] for name in manifest.order], dtype=np.int64).reshape(-1, 3).T
    starts = np.concatenate(([0], np.cumsum(rows)))
    targets = dict(zip(manifest.order, starts[:-1].tolist(), strict=True))
    return ActivationSet(
        sites=tuple(Site.parse(site) for site in manifest.pins.sites),
        ids=manifest.order,
        hidden=_read_hidden(folder, manifest, targets, int(starts[-1])),
        starts=starts,
        prompt_rows=prompt_rows.copy(),
        skips=skips.copy(),
        tail=manifest.pins.tail,
    )


def responses(folder: Path) -> dict[str, list[int]]:
    """Read the token ids that the model generated, by conversation; empty where it generated none.

    Raises:
        DataError: if a file is damaged.
    """
    result: dict[str, list[int]] = {}
    for entry in read_manifest(folder).shards:
        with _open_shard(folder, entry) as shard:
            ids, starts = shard.get_tensor("response_ids"), shard.get_tensor("response_starts").tolist()
        for index, name in enumerate(entry.keys):
            result[name] = ids[starts[index] : starts[index + 1]].tolist()
    return result


def _tensors(rows: Sequence[CapturedRows]) -> dict[str, Tensor]:
    return {
        "hidden": torch.cat([item.hidden for item in rows]),
        "starts": _starts([len(item.hidden) for item in rows]),
        "prompt_rows": torch.tensor([item.prompt_rows for item in rows]),
        "skips": torch.tensor([item.skip for item in rows]),
        "response_ids": torch.tensor([token for item in rows for token in item.response], dtype=torch.int64),
        "response_starts": _starts([len(item.response) for item in rows]),
    }


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _read_lengths(folder: Path, entry: ShardEntry) -> dict[str, tuple[int, int, int]]:
    """Check the file, and return rows, prompt rows and skip of each conversation."""
    with _open_shard(folder, entry) as shard:
        if sha256(folder / entry.file) != entry.sha256:
            raise DataError(
                f"{folder / entry.file} is damaged: its SHA-256 is not the one in the manifest; delete it and run again"
            )
        columns = [shard.get_tensor(name) for name in ("starts", "prompt_rows", "skips")]
    columns[0] = columns[0].diff()
    return dict(zip(entry.keys, zip(*(column.tolist() for column in columns), strict=True), strict=True))


def _read_hidden(folder: Path, manifest: Manifest, target: Mapping[str, int], total: int) -> Tensor:
    hidden_TPD: Tensor | None = None
    for entry in manifest.shards:
        with _open_shard(folder, entry) as shard:
            block, starts = shard.get_tensor("hidden"), shard.get_tensor("starts").tolist()
        if hidden_TPD is None:
            hidden_TPD = torch.empty(total, *block.shape[1:], dtype=block.dtype)
        for index, name in enumerate(entry.keys):
            rows = block[starts[index] : starts[index + 1]]
            hidden_TPD[target[name] : target[name] + len(rows)] = rows
    assert hidden_TPD is not None
    return hidden_TPD


@contextmanager
def _open_shard(folder: Path, entry: ShardEntry) -> Iterator[Any]:
    path = folder / entry.file
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and run again") from error


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
