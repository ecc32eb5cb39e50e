"""Signatures from one operator to another: signed on the way out, checked and tried on the way in."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from spider_sense.errors import BankError
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.signing import sign, verify

__all__ = ["Taken", "export_signatures", "import_signatures"]


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a signature that came from elsewhere."""

    id: str
    refused: str | None = None
    """Why it was refused; None if it was taken."""


def export_signatures(bank: SignatureBank, folder: Path, private_key: Path, ids: Collection[str] = ()) -> int:
    """Write signatures to a new folder and sign it; neither texts nor traffic go with them.

    Args:
        bank: whose.
        folder: where to.
        private_key: PEM file.
        ids: which; all of them if none is named.

    Returns:
        How many were written.

    Raises:
        BankError: if the bank has no such signature, or none at all, or the folder is in use.
        ConfigError: if the key cannot be used.
        MissingExtraError: if model-signing is not installed.
    """
    chosen = bank.only(ids)
    if not chosen.signatures:
        raise BankError("the bank has no signature to export; make one with: spider-sense signatures add")
    chosen.save_pretrained(folder)
    sign(folder, private_key, SignatureBank.from_pretrained)
    return len(chosen.signatures)


def import_signatures(bank: SignatureBank, folder: Path, public_key: Path) -> tuple[SignatureBank, list[Taken]]:
    """Take in signatures that another operator exported; each is tried on this bank's own traffic.

    None of them changes a signature that the bank has: a near-duplicate stands beside it.

    Args:
        bank: what they go into.
        folder: what was exported.
        public_key: PEM file of whoever exported it.

    Returns:
        The bank with those that passed, and what became of each.

    Raises:
        BankError: if the folder holds no sound bank, or the bank has no traffic.
        MismatchError: if they were made for another model, or another site.
        SignatureError: if the folder is not what the owner of the key signed.
    """
    verify(folder, public_key, SignatureBank.from_pretrained)
    found = SignatureBank.from_pretrained(folder)
    bank.check_same_space(found)
    bank.tried_on()
    results = []
    for signature in sorted(found.signatures, key=lambda item: item.benign):
        try:
            bank, _ = bank.added(replace(signature, about=signature.about.model_copy(update={"imported": True})))
            results.append(Taken(signature.about.id))
        except BankError as error:
            results.append(Taken(signature.about.id, str(error)))
    return bank, results
