"""The extraction guard on disk: ``extraction.json`` and ``extraction.safetensors``."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from spider_sense.errors import ConfigError, GuardError, MismatchError, SiteError
from spider_sense.extraction.decision import Tier
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import VERSION
from spider_sense.extraction.level import LevelModel
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.population import Population
from spider_sense.extraction.sketch import Sketch
from spider_sense.extraction.thresholds import Budget, Calibration
from spider_sense.extraction.tiers import TieredDetector
from spider_sense.fingerprint import Fingerprint, check_match
from spider_sense.folders import ArtifactKind, Record, VersionedRecord, sha256
from spider_sense.types import Site

__all__ = ["KIND", "Artifact", "ExtractionManifest"]

MANIFEST, TENSORS = "extraction.json", "extraction.safetensors"
KIND = ArtifactKind(
    noun="extraction guard",
    manifest=MANIFEST,
    version=VERSION,
    maker="spider-sense extraction fit",
    again="fit",
    error=GuardError,
)


class ModelRecord(Record):
    """The numbers of a level model that are no arrays."""

    centre: float
    spread: float


class ExtractionManifest(VersionedRecord):
    """``extraction.json``."""

    schema_version: int = VERSION
    """That of the states' layout: another one reads no states of this one."""
    base: Fingerprint | None
    """The model whose hidden states the sketch reads; None if the events came with activations."""
    site: str
    width: int = Field(ge=1)
    """Of the hidden state."""
    key_digest: str
    """Names the key; the hashes of another one are not comparable."""
    probes: tuple[str, ...]
    lists: tuple[str, ...] = ()
    levels: dict[int, ModelRecord] = Field(min_length=1)
    recent: ModelRecord
    """The level of recent requests."""
    floors: dict[str, float]
    principals: int
    """Honest principals that the population was fitted on."""
    budget: Budget | None = None
    """None before calibration."""
    strata: dict[str, int] = Field(default_factory=dict)
    """Honest principals of calibration, by tenant type."""
    groups: tuple[str, ...] = ()
    """Tenant types of the honest linked groups of calibration."""
    horizons: dict[str, int] = Field(default_factory=dict)
    """Requests that calibration covers, by tenant type."""
    least: dict[Tier, dict[str, float | None]] = Field(default_factory=dict)
    """What the thresholds of level and group are at least, by tenant type; None is infinite."""
    tensors_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artifact:
    """Sketch, population, known lists and thresholds, for one model and one key."""

    sketch: Sketch
    population: Population
    site: Site
    key_digest: str
    base: Fingerprint | None = None
    lists: KnownLists | None = None
    fitted: frozenset[int] = frozenset()
    """Keyed hashes of the honest principals that were fitted on."""
    calibration: Calibration | None = None

    @property
    def width(self) -> int:
        """Of the hidden state."""
        return len(self.sketch.mean)

    @property
    def digest(self) -> str:
        """Short name of this artifact; what is stored under another one is not comparable."""
        hashed = hashlib.sha256(self._manifest().model_dump_json().encode())
        for name, tensor in sorted(_tensors(self).items()):
            hashed.update(name.encode() + tensor.numpy().tobytes())
        return hashed.hexdigest()[:16]

    def check_model(self, found: Fingerprint) -> None:
        """Check that the sketch was fitted on this model.

        Raises:
            MismatchError: with both values.
        """
        if self.base is None:
            raise MismatchError(
                f"this extraction guard was fitted on activations without a model, so {found.base_model} cannot be "
                "compared with it; give events with activations, or fit on text with --model"
            )
        check_match(self.base, found, "fit an extraction guard for this model")

    def check_key(self, key: Key) -> None:
        """Check that a key is the one of the fit.

        Raises:
            MismatchError: with both digests.
        """
        if key.digest != self.key_digest:
            raise MismatchError(
                f"the key is {key.digest}, the extraction guard was fitted under {self.key_digest}; use that key, "
                "or fit and calibrate again under this one"
            )

    def detector(self, key: Key) -> TieredDetector:
        """Return the detector.

        Raises:
            MismatchError: if the key is another one.
        """
        self.check_key(key)
        return TieredDetector(self.population, self.calibration, key, self.width)

    def calibrated(self, calibration: Calibration) -> "Artifact":
        """Return the same with thresholds."""
        return replace(self, calibration=calibration)

    def save_pretrained(self, folder: str | Path) -> "Artifact":
        """Write it, in the place of an older one, and return it as it is read back."""
        with KIND.staged(Path(folder)) as beside:
            save_file(_tensors(self), beside / TENSORS)
            manifest = self._manifest().model_copy(update={"tensors_digest": sha256(beside / TENSORS)})
            (beside / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            return Artifact.from_pretrained(beside)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Artifact":
        """Read it.

        Raises:
            GuardError: if a file is missing, damaged, of another version, or not the one that the manifest names.
        """
        folder = Path(folder)
        manifest = KIND.read_manifest(folder, ExtractionManifest)
        tensors = KIND.read_tensors(folder / TENSORS, manifest.tensors_digest)
        try:
            return _artifact(manifest, {name: tensor.numpy() for name, tensor in tensors.items()})
        except (KeyError, SiteError, ConfigError) as error:
            raise GuardError(f"{folder}: {error}: manifest and tensors do not fit; fit or copy it again") from error

    def _manifest(self) -> ExtractionManifest:
        population, calibration = self.population, self.calibration
        strata = {} if calibration is None else calibration.maxima["own"]
        least = {} if calibration is None else calibration.least
        return ExtractionManifest(
            base=self.base,
            site=str(self.site),
            width=self.width,
            key_digest=self.key_digest,
            probes=self.sketch.names,
            lists=() if self.lists is None else self.lists.names,
            levels={at: _record(model) for at, model in population.levels.items()},
            recent=_record(population.recent),
            floors=dict(population.floors),
            principals=population.principals,
            budget=None if calibration is None else calibration.budget,
            strata={name: len(values) for name, values in strata.items()},
            groups=() if calibration is None else tuple(calibration.maxima["group"]),
            horizons={} if calibration is None else dict(calibration.horizons),
            least={
                tier: {name: value if np.isfinite(value) else None for name, value in by_stratum.items()}
                for tier, by_stratum in least.items()
            },
        )


_SKETCH = ("mean", "projection", "weights", "biases")
_POPULATION = ("edges", "centres", "active")
_LEAST = -1e300
"""Stands for -inf, of a principal without the evidence that a tier needs: the file holds finite numbers only."""


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    population = artifact.population
    arrays = {f"sketch.{name}": getattr(artifact.sketch, name) for name in _SKETCH}
    arrays |= {f"population.{name}": getattr(population, name) for name in _POPULATION}
    for at, model in (*population.levels.items(), ("recent", population.recent)):
        arrays[f"level.{at}.mean"] = model.mean
        # An infinite scale marks a feature that never varied; the file holds finite numbers only.
        arrays[f"level.{at}.scale"] = np.where(np.isfinite(model.scale), model.scale, -1.0)
    arrays["prevalence.tokens"] = np.array(list(population.prevalence), dtype=np.uint64).view(np.int64)
    arrays["prevalence.counts"] = np.array(list(population.prevalence.values()), dtype=np.int64)
    if artifact.lists is not None:
        arrays["lists.owner"] = artifact.lists.owner_M
        arrays["lists.signatures"] = artifact.lists.signatures_MH.view(np.int32)
    arrays["fitted"] = np.array(sorted(artifact.fitted), dtype=np.uint64).view(np.int64)
    if artifact.calibration is not None:
        for name in ("maxima", "lasting"):
            for tier, maxima in getattr(artifact.calibration, name).items():
                for stratum, values in maxima.items():
                    arrays[f"{name}.{tier}.{stratum}"] = np.maximum(values, _LEAST)
        arrays["unnamed"] = np.array([artifact.calibration.unnamed])
        arrays["unnamed_groups"] = np.array([artifact.calibration.unnamed_groups])
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _artifact(manifest: ExtractionManifest, arrays: Mapping[str, np.ndarray]) -> Artifact:
    lists = None
    if manifest.lists:
        lists = KnownLists.restore(manifest.lists, arrays["lists.owner"], arrays["lists.signatures"].view(np.uint32))
    sketch = Sketch(**{name: arrays[f"sketch.{name}"] for name in _SKETCH}, names=manifest.probes)
    if len(sketch.mean) != manifest.width or len(sketch.biases) != len(manifest.probes):
        raise ConfigError(f"{len(sketch.mean)} numbers wide where {manifest.width} are named")
    tokens = arrays["prevalence.tokens"].view(np.uint64)
    population = Population(
        **{name: arrays[f"population.{name}"] for name in _POPULATION},
        levels={at: _model(f"level.{at}", record, arrays) for at, record in sorted(manifest.levels.items())},
        recent=_model("level.recent", manifest.recent, arrays),
        floors=manifest.floors,
        prevalence=dict(zip(tokens.tolist(), arrays["prevalence.counts"].tolist(), strict=True)),
        principals=manifest.principals,
        probe_names=manifest.probes,
    )
    return Artifact(
        sketch=sketch,
        population=population,
        site=Site.parse(manifest.site),
        key_digest=manifest.key_digest,
        base=manifest.base,
        lists=lists,
        fitted=frozenset(arrays["fitted"].view(np.uint64).tolist()),
        calibration=_calibration(manifest, arrays),
    )


def _record(model: LevelModel) -> ModelRecord:
    return ModelRecord(centre=model.centre, spread=model.spread)


def _model(name: str, record: ModelRecord, arrays: Mapping[str, np.ndarray]) -> LevelModel:
    scale = arrays[f"{name}.scale"]
    return LevelModel(arrays[f"{name}.mean"], np.where(scale < 0, np.inf, scale), record.centre, record.spread)


def _calibration(manifest: ExtractionManifest, arrays: Mapping[str, np.ndarray]) -> Calibration | None:
    if manifest.budget is None:
        return None
    tiers: tuple[Tier, ...] = ("own", "level")

    def read(name: str, tier: Tier, strata: Iterable[str]) -> dict[str, np.ndarray]:
        found = {stratum: arrays[f"{name}.{tier}.{stratum}"] for stratum in strata}
        return {stratum: np.where(values > _LEAST, values, -np.inf) for stratum, values in found.items()}

    maxima: dict[Tier, dict[str, np.ndarray]] = {tier: read("maxima", tier, manifest.strata) for tier in tiers}
    maxima["group"] = read("maxima", "group", manifest.groups)
    lasting: dict[Tier, dict[str, np.ndarray]] = {tier: read("lasting", tier, manifest.horizons) for tier in tiers}
    least = {
        tier: {name: np.inf if value is None else value for name, value in by_stratum.items()}
        for tier, by_stratum in manifest.least.items()
    }
    unnamed, groups = (int(arrays[name][0]) for name in ("unnamed", "unnamed_groups"))
    return Calibration(maxima, manifest.budget, manifest.horizons, least, unnamed, groups, lasting)
