"""Benign fine-tuning: it teaches what it is given, and leaves the very same weights behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nest.fine_tuning import fine_tuned, with_response
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

IDS = torch.arange(3, 23).view(2, 10)


def logits(loaded: LoadedModel) -> Tensor:
    model: Any = loaded.model
    with torch.no_grad():
        output: Tensor = model(IDS).logits
    return output


def test_weights_move_inside_and_are_back_after(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    rows = [replace(row, response="w3 w4 w5") for row in tiny_neurons.prompt_rows(20, None, 0)]
    before, plain = logits(tiny_loaded), {name: one.clone() for name, one in tiny_loaded.model.state_dict().items()}
    tiny_loaded.model.requires_grad_(False)
    with fine_tuned(tiny_loaded, rows) as steps:
        assert steps == 3
        inside = logits(tiny_loaded)
    assert not torch.equal(inside, before)
    assert torch.equal(logits(tiny_loaded), before)
    assert all(one.equal(plain[name]) for name, one in tiny_loaded.model.state_dict().items())
    assert not any(one.requires_grad or one.grad is not None for one in tiny_loaded.model.parameters())


def test_an_error_inside_puts_them_back_too(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    before = logits(tiny_loaded)
    rows = [replace(row, response="w3") for row in tiny_neurons.prompt_rows(8, None, 0)]
    with pytest.raises(KeyboardInterrupt), fine_tuned(tiny_loaded, rows):
        raise KeyboardInterrupt
    assert torch.equal(logits(tiny_loaded), before)


def test_rows_without_responses_are_refused(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    rows = tiny_neurons.prompt_rows(5, None, 0)
    assert with_response([replace(rows[0], response=""), replace(rows[1], response="yes")]) == [
        replace(rows[1], response="yes")
    ]
    with pytest.raises(DataError, match="none of 5 benign rows has a 'response'"), fine_tuned(tiny_loaded, rows):
        raise AssertionError("never entered")
