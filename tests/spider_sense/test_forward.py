from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spider_sense.forward import Forward, SequenceRows, padded_rows, read_forward

IDS = torch.zeros(2, 4, dtype=torch.int64)


def cache(length: int) -> Any:
    return SimpleNamespace(get_seq_length=lambda: length)


def names(forward: Forward) -> list[tuple[object, list[int], list[int]]]:
    return [(item.key, item.rows.tolist(), item.positions.tolist()) for item in forward.sequences]


def test_a_batch_without_padding() -> None:
    forward = read_forward((IDS,), {})
    assert (forward.total, forward.tokens, forward.past) == (8, 4, 0)
    assert names(forward) == [(0, [0, 1, 2, 3], [0, 1, 2, 3]), (1, [4, 5, 6, 7], [0, 1, 2, 3])]
    assert all(item.rows.dtype == item.positions.dtype == np.int64 for item in forward.sequences)


@pytest.mark.parametrize(
    ("row", "rows", "positions"),
    [
        ([0, 0, 1, 1], [6, 7], [0, 1]),
        ([1, 1, 1, 0], [4, 5, 6], [0, 1, 2]),
        ([0, 1, 1, 0], [5, 6], [0, 1]),
        ([1, 0, 1, 1], [4, 6, 7], [0, 1, 2]),
        ([0, 0, 0, 0], [], []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_has_no_name(row: list[int], rows: list[int], positions: list[int], dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 1, 1], row]).to(dtype)
    forward = read_forward((), {"input_ids": IDS, "attention_mask": mask})
    assert names(forward) == [(0, [0, 1, 2, 3], [0, 1, 2, 3]), (1, rows, positions)]
    assert forward.total == 8


def test_positions_go_on_behind_the_cache() -> None:
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    step = {"input_ids": IDS[:, :1], "attention_mask": mask, "past_key_values": cache(6)}
    forward = read_forward((), step)
    assert names(forward) == [(0, [0], [6]), (1, [1], [4])]
    assert (forward.total, forward.tokens, forward.past) == (2, 1, 6)


def test_a_chunk_of_a_left_padded_prompt() -> None:
    mask = torch.tensor([[1] * 6, [0, 0, 0, 0, 0, 1]])
    forward = read_forward((IDS,), {"attention_mask": mask, "past_key_values": cache(2)})
    assert names(forward) == [(0, [0, 1, 2, 3], [2, 3, 4, 5]), (1, [7], [0])]


def test_a_cache_without_a_mask() -> None:
    assert names(read_forward((IDS[:1, :2],), {"past_key_values": cache(5)})) == [(0, [0, 1], [5, 6])]


def test_a_mask_of_the_new_tokens_alone_is_completed() -> None:
    forward = read_forward(
        (IDS[:1, :2],),
        {"attention_mask": torch.ones(1, 2), "past_key_values": SimpleNamespace(get_seq_length=lambda: 5)},
    )
    assert names(forward) == [(0, [0, 1], [5, 6])]


def test_an_empty_cache_that_is_passed_along_counts_nothing() -> None:
    forward = read_forward((IDS[:1],), {"attention_mask": torch.ones(1, 4), "past_key_values": cache(0)})
    assert names(forward) == [(0, [0, 1, 2, 3], [0, 1, 2, 3])]


def test_embeddings_count_as_inputs() -> None:
    assert names(read_forward((), {"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 8)})) == [(0, [0, 1], [0, 1])]


def spread(mask_BK: list[list[int]], queries: int, columns: int) -> torch.Tensor:
    """A causal mask over a static cache: [B, 1, Q, K], True where a query attends."""
    real = torch.zeros(len(mask_BK), columns, dtype=torch.bool)
    known = torch.tensor(mask_BK, dtype=torch.bool)
    real[:, : known.shape[1]] = known
    past = known.shape[1] - queries
    causal = torch.arange(columns)[None] <= past + torch.arange(queries)[:, None]
    return (causal & real[:, None])[:, None]


@pytest.mark.parametrize("kind", ["bool", "additive", "by layer type"])
def test_a_mask_of_queries_against_keys(kind: str) -> None:
    mask: Any = spread([[1, 1, 1, 1], [0, 0, 1, 1]], 4, 9)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    if kind == "by layer type":
        mask = {"sliding_attention": None, "full_attention": mask}
    ids = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    forward = read_forward((IDS,), {"attention_mask": mask, "position_ids": ids, "past_key_values": cache(0)})
    assert names(forward) == [(0, [0, 1, 2, 3], [0, 1, 2, 3]), (1, [6, 7], [0, 1])]


def test_a_step_with_a_mask_of_queries_against_keys() -> None:
    step = {
        "input_ids": IDS[:, :1],
        "attention_mask": spread([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], 1, 9),
        "position_ids": torch.tensor([[4], [2]]),
        "past_key_values": SimpleNamespace(get_seq_length=lambda: torch.tensor(4)),
    }
    assert names(read_forward((), step)) == [(0, [0], [4]), (1, [1], [2])]


def test_a_sliding_window_that_is_narrower_than_the_past() -> None:
    step = {
        "input_ids": IDS[:1, :1],
        "attention_mask": torch.ones(1, 1, 1, 6, dtype=torch.bool),
        "position_ids": torch.tensor([[20]]),
        "past_key_values": cache(20),
    }
    assert names(read_forward((), step)) == [(0, [0], [20])]


def test_a_call_without_inputs_is_an_error() -> None:
    with pytest.raises(TypeError, match="without input_ids"):
        read_forward((), {"attention_mask": torch.ones(1, 2)})


def test_a_mask_by_place_is_an_error() -> None:
    with pytest.raises(TypeError, match="by name"):
        read_forward((IDS, torch.ones(2, 4)), {})


def test_padded_rows_of_a_later_pass() -> None:
    mask_BK = np.array([[False, True, True, True], [True, True, False, True]])
    rows = padded_rows(mask_BK, past=2, tokens=2)
    assert [(item.rows.tolist(), item.positions.tolist()) for item in rows] == [([0, 1], [1, 2]), ([3], [2])]


def test_every_real_token_is_named_once_whatever_the_chunks() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        mask_BK = random.random((3, 12)) < 0.7
        cuts = sorted({0, 12, *random.integers(1, 12, 3).tolist()})
        found: list[list[int]] = [[], [], []]
        for past, stop in pairwise(cuts):
            item: SequenceRows
            for item in padded_rows(mask_BK, past, stop - past):
                found[int(str(item.key))] += item.positions.tolist()
        assert found == [list(range(count)) for count in mask_BK.sum(1)]
