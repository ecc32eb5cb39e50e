"""Traffic that a new signature is tried on before it is taken: benign spans, and attacks.

A signature that fires on everything, by mistake or because somebody poisoned it, shows here. For an attack's signature
the harm is false alarms, so it is held to a budget of benign spans. A benign look-alike excuses what it fires on, so it
is held to the same budget on benign spans, of which it should know a few alone, and to none of the attacks.

Shape letters: M benign spans, K attacks, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spider_sense.errors import BankError
from spider_sense.metrics import most_within
from spider_sense.screening.signature import Signature, Trial

__all__ = ["Fires", "Traffic"]

Fires = Callable[[Tensor, Signature], Tensor]
"""(unit vectors [T, D], signature) -> bool [T]."""


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Unit vectors of spans, in a bank's own space."""

    benign_MD: Tensor
    """[M, D] float32."""
    attacks_KD: Tensor
    """[K, D] float32."""

    def try_out(self, signature: Signature, fires: Fires, budget: float) -> Trial:
        """Let a signature fire on the traffic.

        Args:
            signature: what is to be taken into a bank.
            fires: the bank's own search.
            budget: largest share of benign spans that it may fire on.

        Returns:
            The counts.

        Raises:
            BankError: if it fires too often, or there is too little traffic to tell.
        """
        name, needed = signature.about.id, math.ceil(1 / budget)
        if len(self.benign_MD) < needed:
            raise BankError(
                f"{name}: {len(self.benign_MD)} benign spans cannot show a rate of {budget:g}; give {needed} or more"
            )
        fired = int(fires(self.benign_MD, signature).sum())
        if fired > most_within(budget, len(self.benign_MD)):
            raise BankError(
                f"{name} fires on {fired} of {len(self.benign_MD)} benign spans, above the budget of {budget:g}; "
                f"{self._advice(signature, budget)}"
            )
        if not signature.benign:
            return Trial(benign=len(self.benign_MD), fired=fired, attacks=0, excused=0)
        if not len(self.attacks_KD):
            raise BankError(f"{name} is to excuse what looks like it, and there are no attacks to try it on; give some")
        excused = int(fires(self.attacks_KD, signature).sum())
        if excused:
            raise BankError(
                f"{name} would excuse {excused} of {len(self.attacks_KD)} known attacks; make it narrower with --radius"
            )
        return Trial(benign=len(self.benign_MD), fired=fired, attacks=len(self.attacks_KD), excused=0)

    def widest(self, vector_D: Tensor, budget: float) -> float:
        """Return the largest radius, in hundredths, within the budget for a direction; 0 for none."""
        distance_M = torch.sort(1 - self.benign_MD @ vector_D).values
        first_outside = distance_M[most_within(budget, len(distance_M))].item() if len(distance_M) else 0.0
        # A search rounds vectors to bfloat16, which moves a cosine by less than half a hundredth.
        return max(0.0, math.floor((first_outside - 0.005) * 100) / 100)

    def _advice(self, signature: Signature, budget: float) -> str:
        widest = self.widest(signature.vector_D, budget)
        if widest == 0:
            return "it is like ordinary traffic, so choose other examples"
        return f"--radius {widest:.2f} would be narrow enough; this one has {signature.about.radius:.2f}"
