"""The greedy loop: what transformers' own ``generate`` writes, whatever the batch."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from nest.greedy import end_tokens, greedy, left_padded

PAD, TOKENS = 0, 9


def rows_of(lengths: tuple[int, ...], head: int = 0) -> list[list[int]]:
    rng = Random(7)
    opening = [rng.randrange(3, 60) for _ in range(head)]
    return [opening + [rng.randrange(3, 60) for _ in range(length)] for length in lengths]


@pytest.fixture
def lively(tiny_model: Callable[[str], Any]) -> Callable[[str], Any]:
    """Build tiny models with weights so large that what they write depends on all of their input."""

    def build(name: str) -> Any:
        model = tiny_model(name)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.mul_(10)
        return model

    return build


def by_generate(model: Any, row: list[int]) -> list[int]:
    ids = torch.tensor([row])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 62}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [int(token) for token in output[0, len(row) :] if token != 62]


@pytest.mark.parametrize("head", [0, 6])
def test_a_batch_gets_what_generate_gives_each_row(architecture: str, lively: Callable[[str], Any], head: int) -> None:
    model, rows = lively(architecture), rows_of((5, 11, 3), head)
    found = greedy(model, rows, TOKENS, frozenset({62}), PAD)
    assert found == [by_generate(model, row) for row in rows]
    assert len(set(map(tuple, found))) > 1


def test_rows_end_at_their_own_time(lively: Callable[[str], Any]) -> None:
    model, rows = lively("llama"), rows_of((5, 11, 3, 8, 2), head=5)
    whole = [greedy(model, [row], TOKENS, frozenset(), PAD)[0] for row in rows]
    ends = frozenset({whole[0][2], whole[1][0], whole[3][5]})
    cut = [row[: next((at for at, token in enumerate(row) if token in ends), TOKENS)] for row in whole]
    assert greedy(model, rows, TOKENS, ends, PAD) == cut
    # The batch shrank while others ran, or the test tells nothing.
    assert len({len(row) for row in cut}) > 2


def test_what_opens_all_rows_runs_once(tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny_model("llama"), list[tuple[int, ...]]()
    forward = model.forward

    def spy(**inputs: Any) -> Any:
        widths.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    greedy(model, rows_of((5, 4), head=6), 2, frozenset(), PAD)
    assert widths == [(1, 6), (2, 5), (2, 1)]


def test_a_short_sliding_window_shares_no_opening(lively: Callable[[str], Any]) -> None:
    model, rows = lively("mistral"), rows_of((12, 3), head=6)
    model.config.sliding_window = 8
    assert greedy(model, rows, TOKENS, frozenset(), PAD) == [
        greedy(model, [row], TOKENS, frozenset(), PAD)[0] for row in rows
    ]


def test_padding_stands_on_the_left_and_has_no_position() -> None:
    ids_BP, mask_BP, position_BP = left_padded([[5, 6], [7, 8, 9]], PAD)
    assert ids_BP.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert mask_BP.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert position_BP.tolist() == [[0, 0, 1], [0, 1, 2]]


def test_end_tokens_are_the_models_and_the_tokenizers(tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model, type("Tokenizer", (), {"eos_token_id": 2})) == {2, 5, 6}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, type("Tokenizer", (), {"eos_token_id": None})) == frozenset()
