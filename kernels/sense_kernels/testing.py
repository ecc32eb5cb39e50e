"""What tests of the kernels share on every device: how close is close enough, and which sizes are tried."""

import torch
from torch import Tensor

__all__ = ["COLUMNS", "ROWS", "TOLERANCE", "WIDTHS", "assert_close"]

ROWS = (1, 17, 130)
"""Packed rows T: one, less than a tile, three tiles of which the last is nearly empty."""
WIDTHS = (60, 576, 1300)
"""Widths D: less than a load, then two and three segments of which the last is cut short."""
COLUMNS = (1, 3, 65)
"""Logit columns or heads: one, less than a tile, one more than a group of lanes holds."""

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (2e-5, 3e-6),
    torch.bfloat16: (4e-5, 6e-6),
    torch.float16: (4e-5, 6e-6),
}
"""For each dtype of the hidden states: the greatest error of an element, and the root mean square over all elements.

Errors are relative to max(1, |reference|). Both sides are given the same weights and products of 16-bit operands are
exact in fp32, so only the summation differs: its order, and that tensor cores cut partial sums off where others round.
"""

_WORST = 5


def assert_close(*, ref: Tensor, tri: Tensor, dtype: torch.dtype) -> None:
    """Check that a kernel's result is its twin's, up to the rounding that the dtype allows.

    Args:
        ref: what the twin gives, any shape and float or integer dtype.
        tri: what the kernel gives, of the same shape and dtype.
        dtype: of the hidden states; picks the pair of :data:`TOLERANCE`.

    Raises:
        AssertionError: if shapes or dtypes differ, if NaN or either infinity stands at different places, or if an error
            or the root mean square of all errors is too great. The message names the worst coordinates.
    """
    if ref.shape != tri.shape or ref.dtype != tri.dtype:
        raise AssertionError(f"{ref.dtype} {list(ref.shape)} expected, got {tri.dtype} {list(tri.shape)}")
    want, got = ref.detach().cpu().double(), tri.detach().cpu().double()
    for name, of_ref, of_tri in (
        ("NaN", want.isnan(), got.isnan()),
        ("+inf", want.isposinf(), got.isposinf()),
        ("-inf", want.isneginf(), got.isneginf()),
    ):
        differ = of_ref != of_tri
        if differ.any():
            raise AssertionError(f"{name} at different places, {_worst(differ.double(), want, got)}")
    finite = want.isfinite()
    error = torch.where(finite, (got - want).abs() / want.abs().clamp(min=1.0), 0.0)
    greatest, mean_square = TOLERANCE[dtype]
    rms = float(error[finite].square().mean().sqrt()) if finite.any() else 0.0
    if (error > greatest).any() or rms > mean_square:
        raise AssertionError(
            f"greatest error {float(error.max()):.2e} (allowed {greatest:.0e}), root mean square {rms:.2e} (allowed"
            f" {mean_square:.0e}), {_worst(error, want, got)}"
        )


def _worst(error: Tensor, want: Tensor, got: Tensor) -> str:
    """Name the coordinates of the greatest errors, with the expected and the given value."""
    flat = error.flatten()
    places = [int(place) for place in flat.argsort(descending=True)[:_WORST] if flat[place] > 0]
    at = [tuple(int(i) for i in torch.unravel_index(torch.tensor(place), error.shape)) for place in places]
    lines = [f"{list(i)}: expected {float(want[i]):.8g}, got {float(got[i]):.8g}" for i in at]
    return f"in {int((flat > 0).sum())} of {flat.numel()} elements, worst at " + "; ".join(lines)
