"""Two processes tune what one would: real ones, over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from nest.delta import Delta, Deltas, lora_deltas
from nest.lessons import Lesson
from nest.tune import TuneConfig, tune
from spider_sense.experts import resolve_expert
from spider_sense.layouts import is_mixture
from spider_sense.sites import resolve
from spider_sense.types import Site

TESTS = Path(__file__).parents[1]
SETTINGS = {"steps": 5, "batch_size": 8, "learning_rate": 0.01, "pass_size": 3, "kl_weight": 0.0}
SCRIPT = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "nest")!r}]
from tiny_models import tiny_model
from torch import save
from test_tune_processes import addition
from nest.lessons import Lesson
from nest.tune import TuneConfig, processes, tune

lessons = [Lesson((5, 6, 7, 8, 9, 10 + i), (20 + i % 2, 30 + i), "refuse" if i % 2 else "answer") for i in range(8)]
model = tiny_model(sys.argv[2])
change = addition(model)
losses = tune(model, change, lessons, TuneConfig(**{SETTINGS!r}, whiten=sys.argv[3] == "True"), pad=1)
rank = processes(model).process_index
save((change.values(), [[one.refuse, one.answer] for one in losses]), f"{{sys.argv[1]}}/rank{{rank}}.pt")
processes(model).destroy_process_group()  # or gloo may abort the one that ends last
"""


def addition(model: nn.Module) -> Deltas:
    """Return rank 2 on the first block, of a mixture in every expert: not each is reached by each process."""
    if not is_mixture(model, 0):
        return lora_deltas({"0": resolve(model, Site(0, "up")).module}, 2, seed=0)
    module = resolve_expert(model, Site(0, "up", 0)).module
    return Deltas(Delta(module, torch.zeros(2, 32), torch.eye(96, 2), expert) for expert in range(4))


@pytest.mark.parametrize(("kind", "whiten"), [("llama", True), ("mixtral", False)])
def test_two_processes_are_one(
    kind: str, whiten: bool, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path), kind, str(whiten)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lessons = [Lesson((5, 6, 7, 8, 9, 10 + i), (20 + i % 2, 30 + i), "refuse" if i % 2 else "answer") for i in range(8)]
    model = tiny_model(kind)
    alone = addition(model)
    losses = tune(model, alone, lessons, TuneConfig.model_validate({**SETTINGS, "whiten": whiten}), pad=1)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in alone.values().items():
        assert ranks[0][0][name].equal(ranks[1][0][name])
        torch.testing.assert_close(ranks[0][0][name], value, atol=2e-4, rtol=1e-3)
    assert ranks[0][1] == ranks[1][1]
    for (refuse, answer), one in zip(ranks[0][1], losses, strict=True):
        assert (refuse, answer) == pytest.approx((one.refuse, one.answer), abs=1e-4)
