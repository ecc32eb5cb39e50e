"""Full tuning: outside of its blocks the model is the base, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nest.full import FullChange
from nest.lessons import Lesson
from nest.tune import TuneConfig, tune

LESSONS = [Lesson((5, 6, 7, 8, 9, 10 + i), (20 + i % 2, 30 + i), "refuse" if i % 2 else "answer") for i in range(8)]


def test_full_tuning_learns_and_leaves_the_base(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    change = FullChange(model)
    config = TuneConfig(steps=10, batch_size=4, learning_rate=0.01, save_every=5)
    losses = tune(model, change, LESSONS, config, pad=1, folder=tmp_path / "run")
    assert losses[-1].refuse < losses[0].refuse - 0.5
    assert all(value.equal(base[name]) for name, value in model.state_dict().items())
    assert change.count() == sum(value.numel() for value in model.parameters())
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        with change.folded():
            tuned = model(input_ids=ids).logits
        change.alpha = 0.0
        with change.folded():
            assert model(input_ids=ids).logits.equal(bare)
    assert (tuned - bare).abs().max() > 0.1
    # A finished run comes back from its checkpoint.
    again = FullChange(model)
    assert tune(model, again, LESSONS, config, pad=1, folder=tmp_path / "run") == []
    with torch.no_grad(), again.folded():
        assert model(input_ids=ids).logits.equal(tuned)
