"""A bank of signatures: a folder that operators can exchange, and a search through it.

On disk: ``signatures.json`` (:class:`Manifest`), ``signatures.safetensors`` with the vectors and the centre of the
space, and ``traffic.safetensors`` with what new signatures are tried on, which is never exported. No file holds text.

A span's mean activation becomes a unit vector by taking the centre away: hidden states have a large common part, in
which everything is like everything.

Shape letters: T spans, N signatures, D width.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from spider_sense.errors import BankError, MismatchError, nearest
from spider_sense.fingerprint import Fingerprint, check_match
from spider_sense.folders import ArtifactKind, VersionedRecord, sha256
from spider_sense.screening.signature import About, Signature, merged
from spider_sense.screening.signature_search import FiringSet, SignatureSet, fires
from spider_sense.screening.traffic import Traffic
from spider_sense.screening.verdict import Match
from spider_sense.types import Site

__all__ = ["KIND", "Manifest", "SignatureBank"]

KIND = ArtifactKind(
    noun="signature bank",
    manifest="signatures.json",
    version=1,
    maker="spider-sense signatures add",
    again="make",
    error=BankError,
)
VECTORS, TRAFFIC = "signatures.safetensors", "traffic.safetensors"
NEAR = 0.02
"""Cosine distance up to which two signatures of one kind, neither of them imported, are merged."""
CENTRES_DIFFER = 0.02
"""Largest distance of two centres, over their length, that rounding on another machine may explain."""


class Manifest(VersionedRecord):
    """``signatures.json``."""

    fingerprint: Fingerprint
    """Of the model whose activations these are."""
    site: str
    budget: float = Field(gt=0, lt=0.5)
    """Largest share of benign spans that attacks' signatures may fire on together, and look-alikes together."""
    signatures: tuple[About, ...]
    vectors_digest: str
    """SHA-256 of ``signatures.safetensors``."""
    traffic_digest: str | None = None
    """SHA-256 of ``traffic.safetensors``; None where it was left out."""


@dataclass(frozen=True, eq=False)
class SignatureBank:
    """A bank in memory; every change gives another one."""

    fingerprint: Fingerprint
    site: Site
    centre_D: Tensor
    """[D] float32, the mean activation of ordinary spans."""
    budget: float
    signatures: tuple[Signature, ...] = ()
    traffic: Traffic | None = None

    def unit(self, pooled_TD: Tensor) -> Tensor:
        """Return unit vectors [T, D] of mean activations; an empty span stays zero, which matches nothing."""
        units_TD = torch.nn.functional.normalize(pooled_TD.float() - self.centre_D)
        return units_TD * (pooled_TD != 0).any(1, keepdim=True)

    @torch.inference_mode()
    def match(self, pooled_D: Tensor) -> list[Match]:
        """Return what fires on a mean activation [D], nearest first: of each side what fires most surely."""
        units_1D = self.unit(pooled_D[None])
        found = [_firing(units_1D, side) for side in self._sides if side.signatures]
        return sorted((match for match in found if match is not None), key=lambda match: -match.cosine)

    def nearest(self, pooled_D: Tensor, benign: bool = False) -> Match | None:
        """Return the nearest signature of a side, whether it fires or not; None if there is none."""
        side = SignatureSet([item for item in self.signatures if item.benign == benign])
        return _nearest(self.unit(pooled_D[None]), side)

    def added(self, signature: Signature) -> tuple["SignatureBank", str]:
        """Take a signature in, after a trial; one that is there already changes nothing.

        Returns:
            The new bank, and the id that it went into: its own, or that of a near-duplicate it was merged with. An
            imported signature is never merged: its maker says how many examples weigh for it, and enough of them
            would walk the operator's own away from what it stands for.

        Raises:
            BankError: if there is no traffic to try it on, or too little, its name is taken, or it fires too often.
        """
        twin, named = self._twin(signature), self._named(signature.about.id)
        if named is not None and named.about.kind == signature.about.kind and named.vector_D.equal(signature.vector_D):
            return self, named.about.id
        if twin is None and named is not None:
            raise BankError(f"{signature.about.id} is taken by another signature; choose another --id, or remove it")
        whole = signature if twin is None else merged(twin, signature)
        others = replace(self, signatures=tuple(item for item in self.signatures if item is not twin))
        trial = self.tried_on().try_out(whole, fires, self.budget, others._fired(whole.benign))
        taken = replace(whole, about=whole.about.model_copy(update={"trial": trial}))
        return replace(others, signatures=(*others.signatures, taken)), taken.about.id

    def widest(self, vector_D: Tensor, benign: bool) -> float:
        """Return the largest radius of a new signature of a side, in hundredths, that would pass the trial; 0 for none.

        Raises:
            BankError: if the bank holds no traffic.
        """
        return self.tried_on().widest(vector_D, self.budget, self._fired(benign), benign)

    def without(self, ids: Collection[str]) -> "SignatureBank":
        """Return the bank without some signatures.

        Raises:
            BankError: if it has no such signature.
        """
        self._check_known(ids)
        return replace(self, signatures=tuple(item for item in self.signatures if item.about.id not in ids))

    def only(self, ids: Collection[str]) -> "SignatureBank":
        """Return what is given away: some signatures, all of them if none is named, and no traffic.

        Raises:
            BankError: if it has no such signature.
        """
        self._check_known(ids)
        chosen = tuple(item for item in self.signatures if not ids or item.about.id in ids)
        return replace(self, signatures=chosen, traffic=None)

    def check_same_space(self, other: "SignatureBank") -> None:
        """Check that another bank's vectors mean here what they mean there.

        Raises:
            MismatchError: with both values.
        """
        check_match(self.fingerprint, other.fingerprint, "exchange signatures of the same model")
        if self.site != other.site:
            raise MismatchError(f"signatures at {other.site}, expected {self.site}; make them at the same site")
        apart = ((self.centre_D - other.centre_D).norm() / self.centre_D.norm()).item()
        if not apart <= CENTRES_DIFFER:
            raise MismatchError(
                f"the centres of the two banks lie {apart:.2g} apart, more than {CENTRES_DIFFER}: "
                "they were made by different releases; make the signatures anew from their examples"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the bank; an existing bank is replaced only once the new one is complete."""
        with KIND.staged(Path(folder)) as beside:
            vectors_ND = torch.stack([self.centre_D * 0, *(item.vector_D for item in self.signatures)])[1:]
            save_file(
                {"centre": self.centre_D[None].contiguous(), "vectors": vectors_ND.contiguous()}, beside / VECTORS
            )
            if self.traffic is not None:
                parts = {"benign": self.traffic.benign_MD, "attacks": self.traffic.attacks_KD}
                save_file({name: part.contiguous() for name, part in parts.items()}, beside / TRAFFIC)
            manifest = Manifest(
                schema_version=KIND.version,
                fingerprint=self.fingerprint,
                site=str(self.site),
                budget=self.budget,
                signatures=tuple(item.about for item in self.signatures),
                vectors_digest=sha256(beside / VECTORS),
                traffic_digest=sha256(beside / TRAFFIC) if self.traffic is not None else None,
            )
            (beside / KIND.manifest).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SignatureBank":
        """Read a bank.

        Raises:
            BankError: if a file is missing, damaged, of another schema version, or not the one the manifest names.
        """
        folder = Path(folder)
        manifest = KIND.read_manifest(folder, Manifest)
        tensors = KIND.read_tensors(folder / VECTORS, manifest.vectors_digest)
        width = manifest.fingerprint.width
        centre_1D = _tensor(tensors, "centre", folder / VECTORS, 1, width)
        vectors_ND = _tensor(tensors, "vectors", folder / VECTORS, len(manifest.signatures), width)
        _check_units(vectors_ND, folder / VECTORS)
        traffic = None
        if manifest.traffic_digest is not None:
            parts = KIND.read_tensors(folder / TRAFFIC, manifest.traffic_digest)
            benign_MD, attacks_KD = (
                _tensor(parts, name, folder / TRAFFIC, None, width) for name in ("benign", "attacks")
            )
            traffic = Traffic(benign_MD, attacks_KD)
        pairs = zip(manifest.signatures, vectors_ND, strict=True)
        signatures = tuple(Signature(about, vector_D) for about, vector_D in pairs)
        if len({item.about.id for item in signatures}) != len(signatures):
            raise BankError(f"{folder / KIND.manifest} names a signature twice; {KIND.again} the bank again")
        return cls(manifest.fingerprint, Site.parse(manifest.site), centre_1D[0], manifest.budget, signatures, traffic)

    def tried_on(self) -> Traffic:
        """Return the traffic that signatures are tried on, the bank's own attacks among it.

        Raises:
            BankError: if the bank holds none.
        """
        if self.traffic is None:
            raise BankError("the bank holds no traffic to try a signature on; add one with --traffic first")
        known = [item.vector_D[None] for item in self.signatures if not item.benign]
        return replace(self.traffic, attacks_KD=torch.cat([self.traffic.attacks_KD, *known]))

    @cached_property
    def _sides(self) -> list[FiringSet]:
        return [FiringSet([item for item in self.signatures if item.benign == side]) for side in (False, True)]

    def _fired(self, benign: bool) -> Tensor:
        """Return the benign spans of the traffic that a side fires on, bool [M]."""
        return self._sides[benign].search(self.tried_on().benign_MD)[0] >= 0

    def _named(self, name: str) -> Signature | None:
        return next((item for item in self.signatures if item.about.id == name), None)

    def _twin(self, signature: Signature) -> Signature | None:
        if signature.about.imported:
            return None
        own = [item for item in self.signatures if not item.about.imported]
        same = SignatureSet([item for item in own if item.about.kind == signature.about.kind])
        cosine_1, index_1 = same.search(signature.vector_D[None])
        return same.signatures[int(index_1)] if cosine_1 >= 1 - NEAR else None

    def _check_known(self, ids: Collection[str]) -> None:
        names = [item.about.id for item in self.signatures]
        for unknown in [name for name in ids if name not in names]:
            raise BankError(f"the bank has no signature {unknown!r}; {nearest(unknown, names)}")


def _firing(units_1D: Tensor, among: FiringSet) -> Match | None:
    margin_1, index_1 = among.search(units_1D)
    if not margin_1 >= 0:
        return None
    about = among.signatures[int(index_1)].about
    return Match(about.id, about.kind, margin_1.item() + 1 - about.radius, about.radius)


def _nearest(units_1D: Tensor, among: SignatureSet) -> Match | None:
    cosine_1, index_1 = among.search(units_1D)
    if index_1 < 0:
        return None
    about = among.signatures[int(index_1)].about
    return Match(about.id, about.kind, cosine_1.item(), about.radius)


def _tensor(tensors: Mapping[str, Tensor], name: str, path: Path, rows: int | None, width: int) -> Tensor:
    """Return a matrix [rows, width] of a file; any number of rows for None."""
    found = tensors.get(name, torch.empty(0))
    if found.ndim != 2 or found.shape[1] != width or rows not in (None, len(found)):
        raise BankError(
            f"{path}: {name} is {list(found.shape)}, the manifest says {[rows, width]}; {KIND.again} the bank again"
        )
    return found.float()


def _check_units(vectors_ND: Tensor, path: Path) -> None:
    # A longer vector has a larger product with everything: it would fire where no unit vector does.
    length_N = vectors_ND.norm(dim=1)
    if not bool(((length_N - 1).abs() < 1e-3).all()):
        worst = length_N[(length_N - 1).abs().argmax()].item()
        raise BankError(f"{path}: a signature has length {worst:.3g}, not 1; do not trust where it comes from")
