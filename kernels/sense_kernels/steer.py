"""Move chosen rows of the hidden states along a vector.

Shape letters: T packed rows, D width.
"""

import torch
from torch import Tensor

from sense_kernels.score import library

__all__ = ["steer", "steer_torch"]


def steer_torch(hidden_TD: Tensor, strength: Tensor, vector: Tensor) -> Tensor:
    """Return ``hidden + strength * vector`` for rows whose strength is not 0; the others bit for bit as they were.

    Args:
        hidden_TD: [..., D] any float dtype; leading dimensions are T rows together.
        strength: [R] float32 with R >= T.
        vector: [D] float32.
    """
    rows = hidden_TD.numel() // hidden_TD.shape[-1]
    strength_T1 = strength[:rows].view(*hidden_TD.shape[:-1], 1)
    moved_TD = (hidden_TD.float() + strength_T1 * vector).to(hidden_TD.dtype)
    return torch.where(strength_T1 != 0, moved_TD, hidden_TD)


library.define("steer(Tensor hidden, Tensor strength, Tensor vector) -> Tensor")
library.impl("steer", steer_torch, "CompositeExplicitAutograd")


@torch.library.register_fake("sense::steer", lib=library)
def _steer_fake(hidden_TD: Tensor, strength: Tensor, vector: Tensor) -> Tensor:
    return torch.empty_like(hidden_TD)


steer = torch.ops.sense.steer
"""The registered op; same arguments as :func:`steer_torch`."""
