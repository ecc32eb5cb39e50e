"""Score packed hidden states with every probe column of one site, and steer chosen rows.

    y[t] = x[t] @ W / rms(x[t]) + b,    columns [K, K + M) of y through relu and a second matrix

One op, registered with ``torch.library`` and declared to write its last argument, so that ``torch.compile`` can neither
drop nor reorder it. Standardisation and gains are folded into W and b by whoever packs the bank.

Shape letters: T packed rows, D width, K linear columns, M hidden units of all MLP probes of the site, J their columns.
"""

import torch
from torch import Tensor

__all__ = ["score", "score_torch", "steer", "steer_torch"]


def score_torch(
    hidden_TD: Tensor,
    weight: Tensor,
    bias: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """Write the site's logits into the first T rows of ``out``.

    Args:
        hidden_TD: [..., D] any float dtype; leading dimensions are flattened into T.
        weight: [D, K + M] float32.
        bias: [K + M] float32.
        mlp_weight: [M, J] float32; M = 0 for a site without MLP probes.
        mlp_bias: [J] float32.
        eps: added to the mean square before the root, as in RMSNorm.
        out: [R, K + J] float32 with R >= T, written in place; further rows are left alone.
    """
    x_TD = hidden_TD.detach().reshape(-1, hidden_TD.shape[-1])
    if x_TD.dtype != torch.float32:
        x_TD = x_TD.float()
    mean_square_T = torch.linalg.vecdot(x_TD, x_TD).div_(x_TD.shape[1]).add_(eps)
    # A square that overflows would leave the bias alone as a plausible logit; infinity times 0 is NaN.
    inverse_rms_T = mean_square_T.rsqrt().add_(mean_square_T.mul_(0.0))
    y = torch.addcmul(bias, x_TD @ weight, inverse_rms_T[:, None])
    if mlp_weight.shape[0]:
        linear = y.shape[1] - mlp_weight.shape[0]
        y = torch.cat((y[:, :linear], torch.addmm(mlp_bias, y[:, linear:].relu(), mlp_weight)), 1)
    out[: y.shape[0]] = y


_library = torch.library.Library("sense", "DEF")
_library.define(
    "score(Tensor hidden, Tensor weight, Tensor bias, Tensor mlp_weight, Tensor mlp_bias, float eps, Tensor(a!) out)"
    " -> ()"
)
_library.impl("score", score_torch, "CompositeExplicitAutograd")


@torch.library.register_fake("sense::score", lib=_library)
def _score_fake(
    hidden_TD: Tensor, weight: Tensor, bias: Tensor, mlp_weight: Tensor, mlp_bias: Tensor, eps: float, out: Tensor
) -> None:
    return None


score = torch.ops.sense.score
"""The registered op; same arguments as :func:`score_torch`."""


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


_library.define("steer(Tensor hidden, Tensor strength, Tensor vector) -> Tensor")
_library.impl("steer", steer_torch, "CompositeExplicitAutograd")


@torch.library.register_fake("sense::steer", lib=_library)
def _steer_fake(hidden_TD: Tensor, strength: Tensor, vector: Tensor) -> Tensor:
    return torch.empty_like(hidden_TD)


steer = torch.ops.sense.steer
"""The registered op; same arguments as :func:`steer_torch`."""
