"""A signature drafted from a handful of examples, as wide as they and a bank's benign traffic allow.

Shape letters: K examples, D width.
"""

import math

from torch import Tensor

from spider_sense.errors import BankError
from spider_sense.screening.signature import Kind, Signature, distances_left_out, from_examples
from spider_sense.screening.signature_bank import SignatureBank

__all__ = ["draft"]


def draft(
    bank: SignatureBank, name: str, kind: Kind, pooled_KD: Tensor, provenance: str, radius: float | None = None
) -> Signature:
    """Make a signature; it is not in the bank yet.

    Args:
        bank: where it is to go.
        name: its id.
        kind: what it stands for.
        pooled_KD: mean activations [K, D] of the examples.
        provenance: who made it, and from what; never a text of theirs.
        radius: cosine distance up to which it fires; by default as far as the examples lie from the mean of the others,
            and no farther than the budget of benign traffic allows.

    Raises:
        BankError: if there is one example and no radius, or most examples, each left out in turn, would not be found.
    """
    units_KD = bank.unit(pooled_KD)
    if radius is None:
        radius = _radius(bank, name, kind, units_KD)
    return from_examples(name, kind, units_KD, provenance, radius)


def _radius(bank: SignatureBank, name: str, kind: Kind, units_KD: Tensor) -> float:
    if len(units_KD) < 2:
        raise BankError(f"{name}: one example says nothing of a radius; give two or more, or --radius")
    left_out_K = distances_left_out(units_KD)
    mean_D = units_KD.mean(0)
    widest = bank.widest(mean_D / mean_D.norm(), kind == "benign")
    radius = round(min(math.ceil(left_out_K.max().item() * 100) / 100, widest, 0.99), 2)
    found = int((left_out_K <= radius).sum())
    if 2 * found <= len(units_KD):
        raise BankError(
            f"{name}: within the budget of {bank.budget:g} it would find {found} of {len(units_KD)} examples that it "
            f"was not made from; they are too unlike one another, or too like ordinary traffic"
            f"{' or an attack' * (kind == 'benign')}: make several signatures, or choose other examples"
        )
    return max(radius, 0.01)
