"""Tensor-core products and rounding, the same in a compiled kernel and in the interpreter."""

# mypy: disable-error-code="no-untyped-def"

from sense_kernels._triton import INTERPRETED, tl, triton

__all__ = ["dot_half", "dot_single", "round_to"]

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot_half(x, y, total):
    """Add the product of two 16-bit matrices to ``total``, in fp32."""
    if _INTERPRETED:
        # The interpreter would multiply the bit patterns of bf16 as integers; fp32 products of 16-bit values are exact.
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, y, total)


@triton.jit
def dot_single(x, y, total, PRECISION: tl.constexpr):
    """Add the product of two fp32 matrices to ``total``."""
    return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 to the nearest value of a float dtype, ties to even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter would cut the mantissa off.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
