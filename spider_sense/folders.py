"""Folders that hold an artifact: a JSON manifest and tensors that it names by digest. Nothing is pickled.

A folder is replaced only once the new one is complete, and read only if its files are the ones the manifest names.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spider_sense.errors import ConfigError, SpiderSenseError

__all__ = ["ArtifactKind", "Record", "VersionedRecord", "check_file", "check_writable", "sha256", "short_digest"]


class Record(BaseModel):
    """Base of a manifest, of everything that stands in one, and of what is read from it: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionedRecord(Record):
    """Base of a manifest, which says in what form it is written."""

    schema_version: int


RecordT = TypeVar("RecordT", bound=VersionedRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactKind:
    """A sort of folder, and how its faults are told."""

    noun: str
    manifest: str
    """Name of the manifest's file; a folder that has it is one of this kind."""
    version: int
    """The ``schema_version`` that this library reads."""
    maker: str
    """The command that writes it."""
    again: str
    """What to do if it is damaged, such as ``train``."""
    error: type[SpiderSenseError]

    def check_replaceable(self, folder: Path) -> None:
        """Check that the artifact may be written to a folder: it can be made, is empty, or holds one of this kind.

        Raises:
            ConfigError: if it cannot be made.
            SpiderSenseError: of ``error``'s class, if it holds anything else, which would be lost.
        """
        check_writable(folder.absolute().parent)
        if folder.exists() and not (folder / self.manifest).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise self.error(f"{folder} exists and is no {self.noun}, so it is not replaced; name a new folder")

    @contextmanager
    def staged(self, folder: Path) -> Iterator[Path]:
        """Give an empty folder to write into, which takes the place of ``folder`` once the block is done.

        If the block fails, what it wrote is removed and the old folder stays as it was.

        Raises:
            SpiderSenseError: see :meth:`check_replaceable`.
        """
        folder = folder.absolute()
        self.check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder of tempfile's would be closed to every other user.
        beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        beside.mkdir()
        try:
            yield beside
            _open_alike(beside)
            _publish(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def read_manifest(self, folder: Path, record: type[RecordT]) -> RecordT:
        """Read the manifest of a folder.

        Raises:
            SpiderSenseError: of ``error``'s class, if it is missing, damaged or of another version.
        """
        path = folder / self.manifest
        text = self._existing(path).read_bytes()
        try:
            manifest = record.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self.error(
                f"{path}: {where or 'file'}: {first['msg']}; it was damaged or made by another version"
            ) from error
        found = manifest.schema_version
        if found != self.version:
            raise self.error(
                f"{path} has schema version {found}, this library reads {self.version}; "
                f"{self.again} the {self.noun} again"
            )
        return manifest

    def read_tensors(self, path: Path, digest: str | None) -> dict[str, Tensor]:
        """Read a file of tensors.

        Args:
            path: the file.
            digest: its SHA-256 by the manifest.

        Raises:
            SpiderSenseError: of ``error``'s class, if the file is missing, another one, or holds NaN or infinity.
        """
        found = sha256(self._existing(path))
        if found != digest:
            raise self.error(
                f"{path} has SHA-256 {found}, the manifest says {digest}: "
                f"the file is truncated or was exchanged; {self.again} or copy the {self.noun} again"
            )
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise self.error(f"{path} cannot be read: {error}; {self.again} or copy the {self.noun} again") from error
        bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
        if bad is not None:
            raise self.error(f"{path}: {bad} holds numbers that are not finite; {self.again} the {self.noun} again")
        return tensors

    def _existing(self, path: Path) -> Path:
        try:
            if path.is_file():
                path.open("rb").close()
                return path
        except OSError as error:
            raise self.error(
                f"{path} cannot be read: {error.strerror}; name a folder that this user may read"
            ) from error
        raise self.error(f"{path} does not exist; name a folder that `{self.maker}` wrote")


def check_writable(folder: Path) -> None:
    """Check that this user can write into a folder, which need not exist yet.

    Raises:
        ConfigError: if it, or what it would be made in, is a file or closed to this user.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.exists(one))
    if not there.is_dir():
        raise ConfigError(f"cannot write into {folder}: {there} is a file; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write into {folder}: {there} is closed to this user; name another folder")


def check_file(path: Path, renamed: bool = True) -> None:
    """Check that this user can write a file, in a folder that is there.

    Args:
        path: the file.
        renamed: whether it is written beside itself and renamed, which the folder must be open for.

    Raises:
        ConfigError: if the folder is missing or closed to this user, or the file is a folder or read-only.
    """
    folder = path.absolute().parent
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist; make it, or name another file with --out")
    if renamed or not path.exists():
        check_writable(folder)
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file with --out")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write {path}: it is closed to this user; name another file with --out")


def short_digest(manifest: Record) -> str:
    """Return 16 hexadecimal digits that name an artifact by all that its manifest says."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_alike(folder: Path) -> None:
    """Open every file to whom the folder is open: safetensors writes for its owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _publish(beside: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, with nothing half-written in between."""
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
