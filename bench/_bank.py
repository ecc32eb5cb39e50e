"""A bank of signatures from the training part of the stages' examples, one signature a kind of attack."""

import numpy as np
import torch

from spider_sense.errors import BankError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.screening.signature_draft import draft
from spider_sense.screening.stage_data import StageData
from spider_sense.screening.traffic import Traffic
from spider_sense.types import Site

__all__ = ["signature_bank"]

BUDGET = 0.01


def signature_bank(
    loaded: LoadedModel, stages: dict[str, StageData], used: dict[str, np.ndarray], site: Site
) -> SignatureBank:
    """Build the bank; kinds that do not pass their trial are left out, as an operator would be told.

    Args:
        loaded: the model.
        stages: their examples with activations.
        used: by stage, bool [N], the examples that may be used.
        site: where signatures are read.
    """
    pooled: dict[str, list[torch.Tensor]] = {}
    for name, stage in stages.items():
        if name == DRIFT:
            continue
        place = stage.data.sites.index(site)
        for index in np.flatnonzero(used[name]):
            mean_D = stage.data.hidden[int(index), place]
            pooled.setdefault(stage.examples[index].attack and f"{name}-{stage.examples[index].attack}", []).append(
                mean_D
            )
    benign_MD = torch.stack(pooled.pop(""))
    bank = SignatureBank(fingerprint(loaded), site, benign_MD.mean(0), BUDGET)
    attacks_KD = torch.stack([row for rows in pooled.values() for row in rows])
    traffic = Traffic(bank.unit(benign_MD), bank.unit(attacks_KD))
    bank = SignatureBank(fingerprint(loaded), site, benign_MD.mean(0), BUDGET, traffic=traffic)
    for kind, rows in pooled.items():
        name = "".join(letter if letter.isalnum() else "-" for letter in kind)[:64]
        try:
            bank, _ = bank.added(draft(bank, name, "injection", torch.stack(rows), "bench"))
        except BankError:
            continue
    return bank
