"""``make bench-nest``: what it says where the prompt sets or the guard are missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
