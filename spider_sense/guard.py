"""The guard: probes, thresholds and the manifest that says what they are good for.

On disk a guard is a folder: ``guard.json`` (this module's :class:`Manifest`), ``probes.safetensors``, the baselines
that were trained beside it, and steering vectors in ``vectors.safetensors``. Nothing is pickled.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from safetensors.torch import save_file
from torch import Tensor

from spider_sense.calibration import Calibration
from spider_sense.canary import Canaries
from spider_sense.errors import DataError, GuardError, MismatchError, nearest
from spider_sense.fingerprint import Fingerprint, ServingConfig, check_match
from spider_sense.folders import ArtifactKind, Record, VersionedRecord, sha256, short_digest
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.types import Site

__all__ = [
    "BASELINES",
    "KIND",
    "SCHEMA_VERSION",
    "Control",
    "Detector",
    "Guard",
    "Manifest",
    "Template",
]

SCHEMA_VERSION = 1
MANIFEST, PROBES, VECTORS = "guard.json", "probes.safetensors", "vectors.safetensors"
KIND = ArtifactKind(
    noun="guard",
    manifest=MANIFEST,
    version=SCHEMA_VERSION,
    maker="spider-sense train` or, for an agent's stages, `make bench-screening",
    again="train",
    error=GuardError,
)
BASELINES = "baselines"
"""Folder of the text baselines, one subfolder per detector; :mod:`spider_sense.baselines` writes them."""


class Template(Record):
    """What the chat template writes around a user's turn, in tokens."""

    head: tuple[int, ...]
    """Token ids that open every conversation; they are not scored."""
    tail: int
    """Tokens after the user's turn, up to where the model answers."""


class Detector(Record):
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


class Control(Record):
    """A probe that the guard must beat: trained on shuffled labels, or a random direction."""

    name: str
    detector: str
    family: str
    sites: tuple[str, ...]
    aggregator: Aggregator


class Manifest(VersionedRecord):
    """``guard.json``."""

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
    canaries: Canaries | None = None
    """None in guards of before there were any, and then not in the file: their digests stay what they were."""

    @model_validator(mode="after")
    def _canaries_fit(self) -> Self:
        if self.canaries is not None and not self.canaries.fit(len(self.detectors)):
            raise ValueError(f"canaries need a score and a band of each of the {len(self.detectors)} detectors")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = handler(self)
        if self.canaries is None:
            del record["canaries"]
        return record

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
        return short_digest(self.manifest)

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
                f"{known}. {_advice(serving)}, or accept unknown error rates with allow_uncertified"
            )
        # Weights of another precision hash differently, so only the rest can be compared.
        check_match(expected.model_copy(update={"weight_digest": found.weight_digest}), found)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the guard; an existing guard of that name is replaced only once the new one is complete."""
        folder = Path(folder)
        with KIND.staged(folder) as beside:
            if (folder / BASELINES).is_dir():
                shutil.copytree(folder / BASELINES, beside / BASELINES)
            self.write_into(beside)

    def write_into(self, folder: Path) -> None:
        """Write the guard's own files into an existing folder."""
        save_file(_tensors((*self.probes, *self.controls)), folder / PROBES)
        if self.vectors:
            save_file({name: vector.contiguous().clone() for name, vector in self.vectors.items()}, folder / VECTORS)
        digests = {
            "probes_digest": sha256(folder / PROBES),
            "vectors_digest": sha256(folder / VECTORS) if self.vectors else None,
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
        manifest = KIND.read_manifest(folder, Manifest)
        tensors = KIND.read_tensors(folder / PROBES, manifest.probes_digest)
        steers = manifest.vectors_digest is not None or (folder / VECTORS).exists()
        vectors = KIND.read_tensors(folder / VECTORS, manifest.vectors_digest) if steers else {}
        return cls(manifest, _probes(manifest.detectors, tensors), _probes(manifest.controls, tensors), vectors)


def _advice(serving: ServingConfig) -> str:
    if serving.kv_cache is not None:
        return "Serve with the model's own type of KV cache"
    return "Run `spider-sense calibrate` in this configuration"


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
