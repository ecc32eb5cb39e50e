"""Score packed hidden states with every probe column of one site.

    y[t] = x[t] @ W / rms(x[t]) + b,    columns [K, K + M) of y through relu and a second matrix

Registered with ``torch.library`` and declared to write its output argument, so that ``torch.compile`` can neither drop
nor reorder it. Standardisation and gains are folded into W and b by whoever packs the bank.

Shape letters: T packed rows, D width, K linear columns, M hidden units of all MLP probes of the site, J their columns,
CP columns of the stored weight, K + M or more.
"""

import numpy as np
import torch
from torch import Tensor

from sense_kernels._score_kernel import launch_score
from sense_kernels._triton import AVAILABLE
from sense_kernels.launch import Scratch, padded

__all__ = ["library", "numpy_rows", "pack_weight", "score", "score_torch", "score_triton", "split_weight"]

_NUMPY_ROWS = 64
_BLAS_PRODUCTS = 1 << 18
_ONEDNN_ROWS = 512
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def numpy_rows(width: int, columns: int) -> int:
    """Return up to how many rows the CPU path calls numpy, which is quicker on small arrays.

    Beyond 2^18 multiply-adds numpy's OpenBLAS takes threads of its own, which would fight torch's for the cores.
    """
    return min(_NUMPY_ROWS, _BLAS_PRODUCTS // (width * columns))


def pack_weight(weight: Tensor) -> Tensor:
    """Return a weight [D, K + M] as float32 with zero columns up to a multiple of 16."""
    extra = padded(weight.shape[1]) - weight.shape[1]
    return torch.nn.functional.pad(weight.float(), (0, extra)).contiguous()


def split_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split a float32 weight into a high and a low half of a 16-bit dtype, whose sum has about 16 bits of mantissa.

    The products of 16-bit hidden states with both halves run on tensor cores and lose next to nothing. A weight whose
    range the dtype does not hold is returned whole, with None.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return weight, None
    high = weight.to(dtype)
    low = (weight - high.float()).to(dtype)
    error = (weight - high.float() - low.float()).abs().amax(0)
    if not (error <= weight.abs().amax(0) * 2**-16).all():
        return weight, None
    return high, low


def score_torch(
    hidden_TD: Tensor,
    weight: Tensor,
    bias: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    weight_low: Tensor | None = None,
    partials: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Write the site's logits into the first T rows of ``out``.

    Args:
        hidden_TD: [..., D] any float dtype; leading dimensions are flattened into T.
        weight: [D, CP] float32, or its high half in the dtype of ``hidden_TD``.
        bias: [K + M] float32.
        mlp_weight: [M, J] float32; M = 0 for a site without MLP probes.
        mlp_bias: [J] float32.
        eps: added to the mean square before the root, as in RMSNorm.
        out: [R, K + J] float32 with R >= T, written in place; further rows are left alone.
        residual: added to ``hidden_TD`` in float32 and rounded to its dtype, as the engine's fused norm does.
        weight_low: [D, CP], the low half.
        partials: working memory of the GPU kernel (:class:`Scratch`), made anew where it is needed and None.
        tickets: likewise.
    """
    x_TD = _rows(hidden_TD, residual)
    whole = weight.float() if weight_low is None else weight.float() + weight_low.float()
    mean_square_T = (x_TD * x_TD).mean(1) + eps
    # A square that overflows would leave the bias alone as a plausible logit; infinity times 0 is NaN.
    inverse_rms_T = mean_square_T.rsqrt() + mean_square_T * 0.0
    y = (x_TD @ whole[:, : len(bias)]) * inverse_rms_T[:, None] + bias
    if len(mlp_weight):
        linear = len(bias) - len(mlp_weight)
        y = torch.cat((y[:, :linear], y[:, linear:].relu() @ mlp_weight + mlp_bias), 1)
    out[: len(y)] = y


def _rows(hidden_TD: Tensor, residual: Tensor | None) -> Tensor:
    """Return the rows [T, D] in float32, after the rounding that the engine does."""
    x_TD = hidden_TD.detach().reshape(-1, hidden_TD.shape[-1])
    if residual is not None:
        total = x_TD.float() + residual.detach().reshape(x_TD.shape).float()
        x_TD = total.to(x_TD.dtype)
    return x_TD if x_TD.dtype == torch.float32 else x_TD.float()


def _score_cpu(
    hidden_TD: Tensor,
    weight: Tensor,
    bias: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    weight_low: Tensor | None = None,
    partials: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    if weight_low is not None or len(mlp_weight):
        return score_torch(hidden_TD, weight, bias, mlp_weight, mlp_bias, eps, out, residual, weight_low)
    x_TD = _rows(hidden_TD, residual)
    rows, width = x_TD.shape
    if rows > len(out):
        raise ValueError(f"logits of {rows} rows do not fit a buffer of {len(out)}")
    if rows > numpy_rows(width, weight.shape[1]):
        # Products first: they wait less for memory, and the norms then find the rows in a cache.
        y_TC = _product(x_TD, weight)[:, : len(bias)]
        # A norm is one pass; a dot product of rows would write all the squares first.
        norm_T = torch.linalg.vector_norm(x_TD, dim=1)
        mean_square_T = torch.addcmul(norm_T.new_tensor(eps), norm_T, norm_T, value=1 / width)
        # A square that overflows would leave the bias alone as a plausible logit; infinity over infinity is NaN.
        inverse_rms_T = mean_square_T.sqrt().div_(mean_square_T)
        torch.addcmul(bias, y_TC, inverse_rms_T[:, None], out=out[:rows])
        return None
    x, w = x_TD.numpy(), weight.numpy()
    with np.errstate(all="ignore"):
        square_T = np.vecdot(x, x)
        square_T /= np.float32(width)
        square_T += np.float32(eps)
        inverse_T = 1.0 / np.sqrt(square_T)
        inverse_T += square_T * 0.0
        y = np.matmul(x, w)
        y *= inverse_T[:, None]
    np.add(y[:, : len(bias)], bias.numpy(), out=out.numpy()[:rows])
    return None


def _product(x_TD: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight, [T, CP].

    For many rows and few columns oneDNN's product is quicker than that of the BLAS which ``@`` calls.
    """
    if len(x_TD) >= _ONEDNN_ROWS and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight.T, None, "none", [], "")  # type: ignore[no-any-return]
    return x_TD @ weight


def score_triton(
    hidden_TD: Tensor,
    weight: Tensor,
    bias: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    weight_low: Tensor | None = None,
    partials: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Launch the kernel; arguments as of :func:`score_torch`."""
    scratch = None if partials is None or tickets is None else Scratch(partials, tickets)
    launch_score(hidden_TD, residual, weight, weight_low, (bias, mlp_weight, mlp_bias), eps, out, scratch)


library = torch.library.Library("sense", "DEF")
"""Every op of this package is defined here."""
library.define(
    "score(Tensor hidden, Tensor weight, Tensor bias, Tensor mlp_weight, Tensor mlp_bias, float eps, Tensor(a!) out,"
    " Tensor? residual=None, Tensor? weight_low=None, Tensor(b!)? partials=None, Tensor(c!)? tickets=None) -> ()"
)
library.impl("score", score_torch, "CompositeExplicitAutograd")
library.impl("score", _score_cpu, "CPU")
if AVAILABLE:
    library.impl("score", score_triton, "CUDA")


@torch.library.register_fake("sense::score", lib=library)
def _score_fake(*args: object, **kwargs: object) -> None:
    return None


def score(
    hidden_TD: Tensor,
    weight: Tensor,
    bias: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    weight_low: Tensor | None = None,
    partials: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Run the op ``sense::score``; arguments as of :func:`score_torch`.

    Outside a compiled graph the CPU path is called at once: the dispatcher would cost as much as the products.
    """
    eager = hidden_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    call = _score_cpu if eager else torch.ops.sense.score
    call(hidden_TD, weight, bias, mlp_weight, mlp_bias, eps, out, residual, weight_low, partials, tickets)
