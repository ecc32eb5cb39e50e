"""Pools and losses against plain loops over single conversations, with garbage in the padding."""

import math

import pytest
import torch
from torch import Tensor

from spider_sense.training import losses, pooling

LENGTHS = (12, 1, 5, 9)
TARGETS = torch.tensor([1.0, 0.0, 0.0, 1.0])
POSITIVE = torch.tensor(3.0)
POOLS = {
    "attention": (pooling.attention, 4),
    "mean": (pooling.mean, 1),
    "multimax": (pooling.multimax, 3),
    "rolling": (pooling.rolling_attention(4), 4),
}


def batch(columns: int, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    logits = torch.randn(len(LENGTHS), max(LENGTHS), columns, generator=torch.Generator().manual_seed(0)) * 2
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.where(valid[..., None], logits, padding), valid


def singles(columns: int) -> list[Tensor]:
    logits, _ = batch(columns)
    return [row[:length] for row, length in zip(logits, LENGTHS, strict=True)]


def by_hand(name: str, z: Tensor) -> float:
    if name == "mean":
        return float(z.mean())
    if name == "multimax":
        return float((z.softmax(0) * z).sum())
    query, value = z.chunk(2, 1)
    span = len(z) if name == "attention" else min(4, len(z))
    windows = [slice(start, start + span) for start in range(len(z) - span + 1)]
    return sum(
        max(float(query[window, part].softmax(0) @ value[window, part]) for window in windows)
        for part in range(query.shape[1])
    )


@pytest.mark.parametrize("name", sorted(POOLS))
def test_pools_equal_their_definition(name: str) -> None:
    pool, columns = POOLS[name]
    expected = torch.tensor([by_hand(name, z) for z in singles(columns)])
    assert torch.allclose(pool(*batch(columns)), expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(POOLS))
def test_padding_enters_neither_a_pool_nor_its_gradient(name: str) -> None:
    pool, columns = POOLS[name]
    logits, valid = batch(columns, padding=1e4)
    logits.requires_grad_()
    scores = pool(logits, valid)
    assert torch.allclose(scores, pool(*batch(columns)), atol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[~valid].any()
    assert gradient[valid].any()


def test_a_batch_shorter_than_the_window_is_averaged() -> None:
    z = singles(4)[2]
    valid = torch.ones(1, len(z), dtype=torch.bool)
    assert torch.allclose(pooling.rolling_attention(10)(z[None], valid), pooling.attention(z[None], valid))


@pytest.mark.parametrize("window", [4, 16])
def test_windows_are_running_means_and_the_mean_of_what_is_too_short(window: int) -> None:
    means, exists = pooling.windows(*batch(1, padding=1e4), window)
    for row, there, z in zip(means, exists, singles(1), strict=True):
        span = min(window, len(z))
        expected = torch.stack([z[start : start + span].mean() for start in range(len(z) - span + 1)])
        assert torch.allclose(row[there], expected, atol=1e-5)


def cross_entropy(z: float, target: float) -> float:
    return 3.0 * math.log1p(math.exp(-z)) if target else math.log1p(math.exp(z))


def window_means(window: int) -> list[Tensor]:
    means, exists = pooling.windows(*batch(1), window)
    return [row[there] for row, there in zip(means, exists, strict=True)]


def test_the_swim_loss_weighs_windows_by_the_softmax_of_their_logits() -> None:
    got = losses.swim(4)(*batch(1), TARGETS, POSITIVE)
    for value, z, target in zip(got.tolist(), window_means(4), TARGETS.tolist(), strict=True):
        weights = z.softmax(0).tolist()
        expected = sum(w * cross_entropy(x, target) for w, x in zip(weights, z.tolist(), strict=True))
        assert value == pytest.approx(expected, rel=1e-5)


def test_the_swim_loss_never_raises_a_window_of_a_benign_conversation() -> None:
    logits, valid = batch(1)
    logits.requires_grad_()
    loss = losses.swim(1)(logits, valid, torch.zeros(len(LENGTHS)), POSITIVE)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[valid] > 0).all()


def test_the_top_k_mean_takes_what_there_is() -> None:
    means, exists = pooling.windows(*batch(1), 4)
    got = losses.top_k_mean(means, exists, 3)
    expected = [float(z.sort(descending=True).values[:3].mean()) for z in window_means(4)]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.top_k_mean(means, exists, 100).tolist() == pytest.approx(
        [float(z.mean()) for z in window_means(4)], rel=1e-4
    )


def test_the_topk_loss_adds_the_segment_variance_to_benign_conversations() -> None:
    got = losses.topk(4, 3)(*batch(1), TARGETS, POSITIVE).tolist()
    for value, z, target in zip(got, window_means(4), TARGETS.tolist(), strict=True):
        weights = torch.sigmoid(z / 2)
        center = (weights * z).sum() / weights.sum()
        variance = float((weights * (z - center) ** 2).sum() / weights.sum())
        top = float(z.sort(descending=True).values[:3].mean())
        assert value == pytest.approx(cross_entropy(top, target) + 0.01 * (1 - target) * variance, rel=1e-5)


def test_the_segment_variance_survives_logits_far_below_zero() -> None:
    far = torch.full((1, 3), -500.0, requires_grad=True)
    variance = losses.segment_variance(far, torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(variance.sum(), far)
    assert variance.isfinite().all()
    assert gradient.isfinite().all()
