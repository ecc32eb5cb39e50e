"""Traffic that a new signature is tried on before it is taken: benign spans, and attacks.

A signature that fires on everything, by mistake or because somebody poisoned it, shows here. For attacks' signatures
the harm is false alarms, which add up over a bank, so together they are held to a budget of benign spans. A benign
look-alike excuses what it fires on, so look-alikes are held to the same budget on benign spans, of which they should
know a few alone, and to none of the attacks.

Shape letters: M benign spans, U of them on which nothing fires yet, K attacks, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spider_sense.errors import BankError
from spider_sense.rates import most_within
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

    def __str__(self) -> str:
        return f"{len(self.benign_MD)} benign and {len(self.attacks_KD)} attacks"

    def try_out(self, signature: Signature, fires: Fires, budget: float, before_M: Tensor) -> Trial:
        """Let a signature fire on the traffic.

        Args:
            signature: what is to be taken into a bank.
            fires: the bank's own search.
            budget: largest share of benign spans that it may fire on, together with the others of its side.
            before_M: bool [M], the benign spans that the others fire on.

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
        fires_M = fires(self.benign_MD, signature)
        fired, together = int(fires_M.sum()), int((fires_M | before_M).sum())
        if together > most_within(budget, len(self.benign_MD)):
            others = f" and with the others of the bank on {together}" if together > fired else ""
            raise BankError(
                f"{name} fires on {fired} of {len(self.benign_MD)} benign spans{others}, above the budget of "
                f"{budget:g}; {self._advice(signature, budget, before_M)}"
            )
        if not signature.benign:
            return Trial(benign=len(self.benign_MD), fired=fired, attacks=0, excused=0)
        if not len(self.attacks_KD):
            raise BankError(f"{name} is to excuse what looks like it, and there are no attacks to try it on; give some")
        excused = int(fires(self.attacks_KD, signature).sum())
        if excused:
            raise BankError(
                f"{name} would excuse {excused} of {len(self.attacks_KD)} known attacks; "
                f"{self._advice(signature, budget, before_M)}"
            )
        return Trial(benign=len(self.benign_MD), fired=fired, attacks=len(self.attacks_KD), excused=0)

    def widest(self, vector_D: Tensor, budget: float, before_M: Tensor, benign: bool) -> float:
        """Return the largest radius, in hundredths, within what others have left of the budget, and of a benign
        look-alike short of every attack; 0 for none."""
        distance_U = torch.sort(1 - self.benign_MD[~before_M] @ vector_D).values
        room = most_within(budget, len(self.benign_MD)) - int(before_M.sum())
        first_outside = distance_U[room].item() if 0 <= room < len(distance_U) else 0.0
        if benign and len(self.attacks_KD):
            first_outside = min(first_outside, 1 - (self.attacks_KD @ vector_D).max().item())
        # A search rounds vectors to bfloat16, which moves a cosine by less than half a hundredth.
        return max(0.0, math.floor((first_outside - 0.005) * 100) / 100)

    def _advice(self, signature: Signature, budget: float, before_M: Tensor) -> str:
        widest = self.widest(signature.vector_D, budget, before_M, signature.benign)
        if widest == 0:
            return f"it is like ordinary traffic{' or an attack' * signature.benign}, so choose other examples"
        return f"--radius {widest:.2f} would be narrow enough; this one has {signature.about.radius:.2f}"
