"""``make bench-nest``: what it says where the prompt sets or the guard are missing, and whom it lets read again."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nest.answers import generate_answers
from spider_sense.bench import random_patch
from spider_sense.data import Example
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.patching import apply_patch
from spider_sense.policy import Patch, Policy, Rule

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["bench-nest", "bench-nest-quick", "full"])
@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_the_folder_of_prompt_sets_is_asked_for_before_anything_is_made(
    target: str, folder: str | None, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SPIDER_SENSE_DATA"}
    environment |= {"SPIDER_SENSE_DATA": str(tmp_path / folder)} if folder else {}
    command = ["make", "-C", str(ROOT), target, f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"SPIDER_SENSE_DATA is '{environment.get('SPIDER_SENSE_DATA', '')}', which is no folder" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_guard_that_is_not_there_is_named(tmp_path: Path) -> None:
    script, config = ROOT / "bench" / "guarded_patch.py", ROOT / "configs" / "nest-bench.yaml"
    command = [sys.executable, str(script), "--config", str(config), "--guard", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "none/guard.json does not exist" in done.stderr


def suspected(guard: Guard, loaded: LoadedModel, texts: list[str]) -> list[bool]:
    """Ask the bench whom a guard suspects."""
    script: Any = importlib.import_module("guarded_patch")
    rows = [Example(id=text, text=text, label="", category="", source="made", group=text) for text in texts]
    stage = SimpleNamespace(loaded=loaded, sets=SimpleNamespace(harmful=rows, benign=[], borderline=[]))
    bench = SimpleNamespace(stage=stage, config=SimpleNamespace(evaluate=SimpleNamespace(max_prompt_tokens=64)))
    flags: list[bool] = script.suspects(bench, guard)["harmful"]
    return flags


def test_a_guard_that_reads_prompts_again_answers_as_the_bench_mixes(
    guards: Any, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspected prompt has the answer of the patch in the weights, and every other the bare model's."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    with torch.no_grad():
        for weight in tiny_loaded.model.parameters():
            weight.mul_(6 if weight.dim() == 2 else 1)
    texts = [" ".join(f"w{5 * length + n}" for n in range(length)) for length in range(1, 9)]
    options: dict[str, Any] = {"max_new_tokens": 12, "through_generate": True}
    # Prompts of up to four words, with nine tokens of the chat format around them.
    thresholds = guards.calibration(-1e6, 2e6, longer=(1e6, 2e6), bound=13)
    guard = guards.guard(tiny_loaded, [guards.probe("short", "mean", "resid.0")], thresholds)
    patch, base = random_patch(tiny_loaded, scale=1.0), generate_answers(tiny_loaded, texts, **options)
    change = apply_patch(tiny_loaded, patch)
    changed = generate_answers(tiny_loaded, texts, **options)
    change.revert()
    flags = suspected(guard, tiny_loaded, texts)
    policy = Policy(rules=(Rule(detector="*", zone="suspect", action="patch"),), patch=Patch(begin="prompt"))
    with Monitor(guard, policy, patch=patch).attach(tiny_loaded.model, tiny_loaded.tokenizer):
        found = generate_answers(tiny_loaded, texts, **options)
    assert flags == [True] * 4 + [False] * 4
    assert found == [one if on else other for one, other, on in zip(changed, base, flags, strict=True)]
    assert [one != other for one, other in zip(found, base, strict=True)] == flags
