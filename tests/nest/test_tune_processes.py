"""Two processes tune what one would: real ones, over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nest.delta import lora_deltas
from nest.lessons import Lesson
from nest.tune import TuneConfig, tune
from spider_sense.sites import resolve
from spider_sense.types import Site

TESTS = Path(__file__).parents[1]
SETTINGS = {"steps": 5, "batch_size": 8, "learning_rate": 0.01, "pass_size": 3, "kl_weight": 0.0}
SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from tiny_models import tiny_model
from torch import save
from nest.delta import lora_deltas
from nest.lessons import Lesson
from nest.tune import TuneConfig, processes, tune
from spider_sense.sites import resolve
from spider_sense.types import Site

lessons = [Lesson((5, 6, 7, 8, 9, 10 + i), (20 + i % 2, 30 + i), "refuse" if i % 2 else "answer") for i in range(8)]
model = tiny_model("llama")
change = lora_deltas({{"0": resolve(model, Site(0, "up")).module}}, 2, seed=0)
losses = tune(model, change, lessons, TuneConfig(**{SETTINGS!r}), pad=1)
rank = processes(model).process_index
save((change.values(), [[one.refuse, one.answer] for one in losses]), f"{{sys.argv[1]}}/rank{{rank}}.pt")
"""


def test_two_processes_are_one(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lessons = [Lesson((5, 6, 7, 8, 9, 10 + i), (20 + i % 2, 30 + i), "refuse" if i % 2 else "answer") for i in range(8)]
    model = tiny_model("llama")
    alone = lora_deltas({"0": resolve(model, Site(0, "up")).module}, 2, seed=0)
    losses = tune(model, alone, lessons, TuneConfig.model_validate(SETTINGS), pad=1)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in alone.values().items():
        assert ranks[0][0][name].equal(ranks[1][0][name])
        torch.testing.assert_close(ranks[0][0][name], value, atol=2e-4, rtol=1e-3)
    assert ranks[0][1] == ranks[1][1]
    for (refuse, answer), one in zip(ranks[0][1], losses, strict=True):
        assert (refuse, answer) == pytest.approx((one.refuse, one.answer), abs=1e-4)
