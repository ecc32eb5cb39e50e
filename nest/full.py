"""Full fine-tuning behind the same face as :class:`nest.delta.Deltas`: the baseline that may change every weight."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nest.delta import Deltas

__all__ = ["Change", "FullChange"]


class FullChange(nn.Module):
    """A change of all weights of a model, which outside of ``hooked`` and ``folded`` is the base model.

    Args:
        model: the base model. Twice its weights are kept beside it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(model.parameters())
        self.alpha = 1.0
        """Strength: how far the weights go from the base (0) to the tuned model (1)."""
        self._base = [weight.detach().clone() for weight in self.weights]
        self._tuned = [weight.detach().clone() for weight in self.weights]
        self._live = False

    def count(self) -> int:
        """Return how many numbers are trained."""
        return sum(weight.numel() for weight in self.weights)

    def values(self) -> dict[str, Tensor]:
        """Return copies of the tuned weights, on the CPU; inside ``hooked`` as they are by now."""
        weights = self.weights if self._live else self._tuned
        return {str(place): weight.detach().cpu().clone() for place, weight in enumerate(weights)}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take tuned weights that :meth:`values` gave; not inside ``hooked``."""
        assert not self._live
        self._tuned = [values[str(place)].to(base.device) for place, base in enumerate(self._base)]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the tuned weights be trained inside the block."""
        self._load(self._tuned)
        self._live = True
        try:
            yield
        finally:
            self._live = False
            self._tuned = [weight.detach().clone() for weight in self.weights]
            self._load(self._base)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Give the model the tuned weights, at ``alpha``, inside the block."""
        self._load([base.lerp(tuned, self.alpha) for base, tuned in zip(self._base, self._tuned, strict=True)])
        try:
            yield
        finally:
            self._load(self._base)

    @torch.no_grad()
    def _load(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


Change = Deltas | FullChange
"""What can be tuned."""
