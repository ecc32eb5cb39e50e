"""The comparison that the kernels' tests rest on: what it lets pass, what it refuses, and what it then says."""

import math

import pytest
import torch

from sense_kernels.testing import TOLERANCE, assert_close


def test_equal_and_nearly_equal_tensors_pass() -> None:
    ref = torch.tensor([[1.0, -1e6, math.nan], [math.inf, -math.inf, 0.0]])
    assert_close(ref=ref, tri=ref.clone(), dtype=torch.float32)
    assert_close(ref=ref, tri=ref * (1 + 1e-6), dtype=torch.float32)
    assert_close(ref=torch.arange(3), tri=torch.arange(3), dtype=torch.float32)
    assert_close(ref=torch.empty(0, 3), tri=torch.empty(0, 3), dtype=torch.bfloat16)
    assert_close(ref=torch.full((2,), math.nan), tri=torch.full((2,), math.nan), dtype=torch.float16)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_worst_error_is_bounded_and_named(dtype: torch.dtype) -> None:
    ref = torch.linspace(-50, 50, 3000).view(1000, 3)
    tri = ref.clone()
    tri[7, 2] *= 1 + 0.5 * TOLERANCE[dtype][0]
    assert_close(ref=ref, tri=tri, dtype=dtype)
    tri[7, 2] = ref[7, 2] * (1 + 2 * TOLERANCE[dtype][0])
    tri[3, 0] = ref[3, 0] * (1 + 3 * TOLERANCE[dtype][0])
    with pytest.raises(
        AssertionError, match=r"in 2 of 3000 elements, worst at \[3, 0\]: expected .*; \[7, 2\]: expected"
    ):
        assert_close(ref=ref, tri=tri, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_small_errors_everywhere_are_too_much(dtype: torch.dtype) -> None:
    ref, (greatest, mean_square) = torch.full((100,), 4.0, dtype=torch.float64), TOLERANCE[dtype]
    for factor in (0.9, 1.1):
        tri = ref * (1 + factor * mean_square)
        assert factor * mean_square < greatest
        if factor < 1:
            assert_close(ref=ref, tri=tri, dtype=dtype)
            continue
        with pytest.raises(AssertionError, match=r"root mean square"):
            assert_close(ref=ref, tri=tri, dtype=dtype)


@pytest.mark.parametrize(
    ("wanted", "given", "named"),
    [
        (1.0, math.nan, "NaN"),
        (math.nan, 1.0, "NaN"),
        (math.inf, math.nan, "NaN"),
        (1.0, math.inf, r"\+inf"),
        (math.inf, -math.inf, r"\+inf"),
        (-math.inf, -1.0, "-inf"),
    ],
)
def test_nan_and_the_infinities_are_told_apart(wanted: float, given: float, named: str) -> None:
    ref, tri = torch.zeros(2, 3), torch.zeros(2, 3)
    ref[1, 2], tri[1, 2] = wanted, given
    with pytest.raises(AssertionError, match=rf"{named} at different places, in 1 of 6 elements, worst at \[1, 2\]"):
        assert_close(ref=ref, tri=tri, dtype=torch.float32)


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"float32 \[2, 3\] expected, got torch.float32 \[3, 2\]"):
        assert_close(ref=torch.zeros(2, 3), tri=torch.zeros(3, 2), dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"got torch.float64"):
        assert_close(ref=torch.zeros(2), tri=torch.zeros(2).double(), dtype=torch.float32)
