"""Making a bank for a model: the centre of its space, and the traffic that signatures are tried on.

The centre is the mean of the everyday requests that ship with the package, so two operators who serve the same model
have the same space and can exchange signatures.

Shape letters: T texts, D width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spider_sense.corpus import load_corpus
from spider_sense.data import Example
from spider_sense.errors import BankError, DataError
from spider_sense.fingerprint import Fingerprint, check_match, fingerprint
from spider_sense.labels import EXTRACTION, INJECTION, MISUSE, NEGATIVE
from spider_sense.models import LoadedModel
from spider_sense.screening.examples import pool_texts
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.screening.stage import Stage
from spider_sense.screening.traffic import Traffic
from spider_sense.screening.written_calls import ReplayReader
from spider_sense.types import Site

__all__ = ["Pool", "model_pool", "new_bank", "open_bank", "traffic_of", "with_traffic"]

Pool = Callable[[Sequence[str]], Tensor]
"""Texts -> their mean activations [T, D] float32."""

_CENTRE_TEXTS = 120
_ATTACKS = MISUSE.positive | INJECTION.positive | EXTRACTION.positive


def model_pool(loaded: LoadedModel, site: Site, stage: Stage, advance: Callable[[int], None] | None = None) -> Pool:
    """Return what pools texts at a stage of a model's conversations.

    Args:
        loaded: the model.
        site: where its activations are read.
        stage: where the texts are seen.
        advance: called with 1 after each text.
    """
    reader, sense = ReplayReader(ChatSpans(loaded.tokenizer)), ModelSense(loaded, None, site)
    return lambda texts: pool_texts(reader, sense, texts, stage, advance)


def open_bank(folder: Path, loaded: LoadedModel) -> SignatureBank:
    """Read a bank that is for a model.

    Raises:
        BankError: if the folder holds no sound bank.
        MismatchError: if it was made for another model.
    """
    bank = SignatureBank.from_pretrained(folder)
    check_match(
        bank.fingerprint, fingerprint(loaded), "make signatures for this model with: spider-sense signatures add"
    )
    return bank


def new_bank(made_for: Fingerprint, site: Site, budget: float, pool_queries: Pool) -> SignatureBank:
    """Return an empty bank.

    Args:
        made_for: fingerprint of the model.
        site: where its activations are read.
        budget: largest share of benign spans that a signature may fire on.
        pool_queries: pools texts as what a user asks.
    """
    everyday = [row.text for row in load_corpus() if row.source == "corpus_everyday"]
    chosen = everyday[:: max(1, len(everyday) // _CENTRE_TEXTS)][:_CENTRE_TEXTS]
    return SignatureBank(made_for, site, pool_queries(chosen).mean(0), budget)


def traffic_of(bank: SignatureBank, examples: Sequence[Example], pool: Pool) -> Traffic:
    """Pool labelled texts as traffic; rows of other labels are left out.

    Args:
        bank: whose space it is for.
        examples: benign ones, and attacks of any kind.
        pool: pools texts as the stage that they are seen at.

    Raises:
        DataError: if none is benign.
    """
    benign = [row.text for row in examples if row.label in NEGATIVE]
    attacks = [row.text for row in examples if row.label in _ATTACKS]
    if not benign:
        labels = sorted({row.label for row in examples})
        raise DataError(f"no benign row: the labels are {labels}, benign are {sorted(NEGATIVE)}; add a file with some")
    benign_MD, attacks_KD = (
        bank.unit(pool(texts)) if texts else torch.empty(0, len(bank.centre_D)) for texts in (benign, attacks)
    )
    return Traffic(benign_MD, attacks_KD)


def with_traffic(bank: SignatureBank, traffic: Traffic) -> SignatureBank:
    """Return the bank with other traffic in place of its own, on which all its signatures are tried again.

    Raises:
        BankError: naming the first that does not pass.
    """
    fresh = SignatureBank(bank.fingerprint, bank.site, bank.centre_D, bank.budget, traffic=traffic)
    # Attacks first: a look-alike must not excuse one of them.
    for signature in sorted(bank.signatures, key=lambda item: item.benign):
        try:
            fresh, _ = fresh.added(signature)
        except BankError as error:
            raise BankError(
                f"the bank keeps its old traffic, because {signature.about.id}, which is in it, fails on the new: "
                f"{error}; or take it out with: spider-sense signatures remove BANK {signature.about.id}"
            ) from error
    return fresh
