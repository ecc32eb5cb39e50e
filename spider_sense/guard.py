"""The guard: probes, thresholds and the manifest that says what they are good for.

On disk a guard is a folder: ``guard.json`` (this module's :class:`Manifest`), ``probes.safetensors``, the baselines
that were trained beside it, and steering vectors in ``vectors.safetensors``. Nothing is pickled.
"""

import hashlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spider_sense.calibration import Calibration
from spider_sense.errors import DataError, GuardError, MismatchError, nearest
from spider_sense.fingerprint import Fingerprint, ServingConfig, check_match
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.types import Site

__all__ = [
    "BASELINES",
    "SCHEMA_VERSION",
    "Control",
    "Detector",
    "Guard",
    "Manifest",
    "Template",
    "check_replaceable",
    "staged",
]

SCHEMA_VERSION = 1
MANIFEST, PROBES, VECTORS = "guard.json", "probes.safetensors", "vectors.safetensors"
BASELINES = "baselines"
"""Folder of the text baselines, one subfolder per detector; :mod:`spider_sense.baselines` writes them."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Template(_Record):
    """What the chat template writes around a user's turn, in tokens."""

    head: tuple[int, ...]
    """Token ids that open every conversation; they are not scored."""
    tail: int
    """Tokens after the user's turn, up to where the model answers."""


class Detector(_Record):
    """One head: a probe, its aggregator and its thresholds."""

    name: str = Field(pattern=r"^\w+$")
    """Also the name of its folder under ``baselines``."""
    family: str
    sites: tuple[str, ...] = Field(min_length=1)
    """Where it reads; without one its logits would be 0 whatever the model does."""
    aggregator: Aggregator
    calibration: Calibration
    evidence: dict[str, Any]
    """Test metrics, the controls beside them, and what they do not show."""


class Control(_Record):
    """A probe that the guard must beat: trained on shuffled labels, or a random direction."""

    name: str
    detector: str
    family: str
    sites: tuple[str, ...]
    aggregator: Aggregator


class Manifest(_Record):
    """``guard.json``."""

    schema_version: int
    fingerprint: Fingerprint
    template: Template
    detectors: tuple[Detector, ...] = Field(min_length=1)
    controls: tuple[Control, ...] = ()
    certified: tuple[ServingConfig, ...]
    """Serving configurations that the thresholds were calibrated in."""
    training: dict[str, Any]
    """What the guard was trained on: digests, counts, the sweep."""
    probes_digest: str
    """SHA-256 of ``probes.safetensors``."""
    vectors_digest: str | None = None
    """SHA-256 of ``vectors.safetensors``; None if there are no steering vectors."""

    def index(self, detector: str | None = None) -> int:
        """Return the place of a detector by its name, by default that of the first.

        Raises:
            DataError: if the guard has no such detector.
        """
        names = [item.name for item in self.detectors]
        if detector is None:
            return 0
        if detector not in names:
            raise DataError(f"the guard has no detector {detector!r}; {nearest(detector, names)}")
        return names.index(detector)


@dataclass(frozen=True, slots=True)
class Guard:
    """A guard in memory."""

    manifest: Manifest
    probes: tuple[Probe, ...]
    """One per detector, in the manifest's order."""
    controls: tuple[Probe, ...] = ()
    """Controls that are probes, in the manifest's order."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Steering vectors [D] by ``name@site``."""

    @property
    def digest(self) -> str:
        """Short name of this guard version, for audit records."""
        return hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()[:16]

    def check_model(self, found: Fingerprint, serving: ServingConfig, allow_uncertified: bool = False) -> None:
        """Check that the guard was made for this model, served this way.

        Args:
            found: fingerprint of the model at hand.
            serving: how it is served.
            allow_uncertified: accept another dtype, quantisation or adapter, whose effect on the thresholds is unknown.

        Raises:
            MismatchError: with both values.
        """
        expected = self.manifest.fingerprint
        if serving in self.manifest.certified:
            check_match(expected, found)
            return
        if not allow_uncertified:
            known = "; ".join(config.model_dump_json() for config in self.manifest.certified)
            raise MismatchError(
                f"uncertified serving configuration {serving.model_dump_json()}; thresholds were calibrated for "
                f"{known}. Run `spider-sense calibrate` in this configuration, or accept unknown error rates with "
                "allow_uncertified"
            )
        # Weights of another precision hash differently, so only the rest can be compared.
        check_match(expected.model_copy(update={"weight_digest": found.weight_digest}), found)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the guard; an existing guard of that name is replaced only once the new one is complete."""
        folder = Path(folder)
        with staged(folder) as beside:
            if (folder / BASELINES).is_dir():
                shutil.copytree(folder / BASELINES, beside / BASELINES)
            self.write_into(beside)

    def write_into(self, folder: Path) -> None:
        """Write the guard's own files into an existing folder."""
        save_file(_tensors((*self.probes, *self.controls)), folder / PROBES)
        if self.vectors:
            save_file({name: vector.contiguous().clone() for name, vector in self.vectors.items()}, folder / VECTORS)
        digests = {
            "probes_digest": _sha256(folder / PROBES),
            "vectors_digest": _sha256(folder / VECTORS) if self.vectors else None,
        }
        manifest = self.manifest.model_copy(update=digests)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Guard":
        """Read a guard.

        Raises:
            GuardError: if a file is missing, damaged, of another schema version, or not the one the manifest names.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST)
        tensors = _read_tensors(folder / PROBES, manifest.probes_digest)
        steers = manifest.vectors_digest is not None or (folder / VECTORS).exists()
        vectors = _read_tensors(folder / VECTORS, manifest.vectors_digest) if steers else {}
        return cls(manifest, _probes(manifest.detectors, tensors), _probes(manifest.controls, tensors), vectors)


def check_replaceable(folder: Path) -> None:
    """Check that a guard may be written to a folder: it does not exist, is empty, or holds a guard.

    Raises:
        GuardError: if it holds anything else, which would be lost.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise GuardError(f"{folder} exists and is no guard, so it is not replaced; name a new folder")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into, which takes the place of ``folder`` once the block is done.

    If the block fails, what it wrote is removed and the old folder stays as it was.

    Raises:
        GuardError: see :func:`check_replaceable`.
    """
    folder = folder.absolute()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder of tempfile's would be closed to every other user.
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        yield beside
        _publish(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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


def _tensors(probes: tuple[Probe, ...]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for probe in probes:
        for site, site_map in probe.maps.items():
            for name in ("weight", "bias", "mlp_weight", "mlp_bias"):
                value = getattr(site_map, name)
                if value is not None:
                    result[f"{probe.name}/{site}/{name}"] = value.float().contiguous().clone()
    return result


def _probes(records: Sequence[Detector | Control], tensors: Mapping[str, Tensor]) -> tuple[Probe, ...]:
    probes = []
    for detector in records:
        maps = {}
        for site in detector.sites:
            parts = {
                name: tensors.get(f"{detector.name}/{site}/{name}")
                for name in ("weight", "bias", "mlp_weight", "mlp_bias")
            }
            if parts["weight"] is None or parts["bias"] is None:
                raise GuardError(f"{PROBES} holds no weights for {detector.name!r} at {site}; train it again")
            maps[Site.parse(site)] = SiteMap(parts["weight"], parts["bias"], parts["mlp_weight"], parts["mlp_bias"])
        try:
            probes.append(Probe(detector.name, detector.family, detector.aggregator, maps))
        except ValueError as error:
            raise GuardError(f"{MANIFEST} does not fit {PROBES}: {error}; train or copy the guard again") from error
    return tuple(probes)


def _read_manifest(path: Path) -> Manifest:
    text = _existing(path).read_bytes()
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise GuardError(
            f"{path}: {where or 'file'}: {first['msg']}; it was damaged or made by another version"
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise GuardError(
            f"{path} has schema version {manifest.schema_version}, this library reads {SCHEMA_VERSION}; "
            "train the guard again"
        )
    return manifest


def _read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    found = _sha256(_existing(path))
    if found != digest:
        raise GuardError(
            f"{path} has SHA-256 {found}, the manifest says {digest}: "
            "the file is truncated or was exchanged; train or copy the guard again"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise GuardError(f"{path} cannot be read: {error}; train or copy the guard again") from error
    bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise GuardError(f"{path}: {bad} holds numbers that are not finite; train the guard again")
    return tensors


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise GuardError(f"{path} does not exist; name a folder that `spider-sense train` wrote")
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
