"""The benchmark runs each way as often as the others, and patches whom it says."""

from typing import Any

import pytest

from spider_sense import bench
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor

GUARDED = {"heads64_sites8", "heads1_sites1", "patch_0_of_8", "patch_2_of_8"}


def test_every_way_is_run_in_every_round(tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[int] = []
    detach = Monitor.detach

    def count(self: Any) -> None:
        patched.append(sum(case.patched_from is not None for case in self.cases))
        detach(self)

    monkeypatch.setattr(Monitor, "detach", count)
    rounds: list[None] = []
    result = bench.bench(tiny_loaded, batch=8, new_tokens=4, rounds=1, advance=lambda: rounds.append(None))
    # A warming round backwards, and one forwards, in which the last way patches two of eight.
    assert patched == [2, 0, 0, 0, 0, 0, 0, 2]
    assert len(rounds) == 2
    assert set(result["tokens_per_s"]) == {"bare", "bare_again", *GUARDED}
    ratios = {name for name in result if name.endswith("_ratio")}
    to_guard = {f"{name}_to_guard_ratio" for name in GUARDED if name.startswith("patch")}
    assert ratios == {f"{name}_ratio" for name in GUARDED} | to_guard | {"bare_again_ratio"}
    assert all(0 < result[name] < 100 for name in ratios)
    # One round leaves no doubt that rounds could show.
    assert all(result[name.replace("_ratio", "_interval")] == [result[name]] * 2 for name in ratios)


def test_a_quarter_is_patched_whatever_the_batch(tiny_loaded: LoadedModel) -> None:
    assert "patch_1_of_1_ratio" in bench.bench(tiny_loaded, batch=1, new_tokens=2, rounds=1)


def test_a_random_patch_is_of_every_projection(tiny_loaded: LoadedModel) -> None:
    patch = bench.random_patch(tiny_loaded, clusters=3, rows=5)
    assert [str(site) for site in patch.targets] == ["gate.0", "up.0", "gate.1", "up.1"]
    for target in patch.targets.values():
        assert (len(target.neuron_R), target.vectors_KD.shape) == (5, (3, 32))
    assert patch.manifest.trained_parameters == 4 * 3 * 32
