"""A bank of signatures from the training part of the stages' examples, one signature a kind of attack."""

from collections import defaultdict

import numpy as np
import torch

from spider_sense.errors import BankError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel
from spider_sense.screening.bank_making import model_pool, new_bank, with_traffic
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
    pooled: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, stage in stages.items():
        if name == DRIFT:
            continue
        place = stage.data.sites.index(site)
        for index in np.flatnonzero(used[name]):
            attack = stage.examples[index].attack
            pooled[f"{name}-{attack}" if attack else ""].append(stage.data.hidden[int(index), place])
    bank = new_bank(fingerprint(loaded), site, BUDGET, model_pool(loaded, site, "query"))
    benign_MD, attacks = torch.stack(pooled.pop("")), {kind: torch.stack(rows) for kind, rows in pooled.items()}
    bank = with_traffic(bank, Traffic(bank.unit(benign_MD), bank.unit(torch.cat(list(attacks.values())))))
    for kind, rows_KD in attacks.items():
        name = "".join(letter if letter.isalnum() else "-" for letter in kind)[:64]
        try:
            bank, _ = bank.added(draft(bank, name, "injection", rows_KD, "bench"))
        except BankError:
            continue
    return bank
