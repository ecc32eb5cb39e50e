"""The patch as an artifact: it comes back as it was, and a bad one never takes the place of a good one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spider_sense.bench import random_patch
from spider_sense.errors import MismatchError, PatchError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch, PatchTarget


def test_a_patch_comes_back(tiny_loaded: LoadedModel, tmp_path: Path) -> None:
    made = random_patch(tiny_loaded)
    saved, read = made.save_pretrained(tmp_path / "patch"), NeuronPatch.from_pretrained(tmp_path / "patch")
    assert saved.digest == read.digest
    assert list(read.targets) == list(made.targets)
    for site, target in made.targets.items():
        for name in ("neuron_R", "cluster_R", "vectors_KD"):
            assert getattr(read.targets[site], name).equal(getattr(target, name))
    read.check_model(fingerprint(tiny_loaded))


def test_targets_may_share_a_tensor(tiny_loaded: LoadedModel, tmp_path: Path) -> None:
    made = random_patch(tiny_loaded)
    first = next(iter(made.targets.values()))
    NeuronPatch(made.manifest, dict.fromkeys(made.targets, first)).save_pretrained(tmp_path / "patch")


def test_a_bad_patch_leaves_the_good_one(tiny_loaded: LoadedModel, tmp_path: Path) -> None:
    good = random_patch(tiny_loaded).save_pretrained(tmp_path / "patch")
    with pytest.raises(PatchError, match="not finite"):
        random_patch(tiny_loaded, scale=float("nan")).save_pretrained(tmp_path / "patch")
    with pytest.raises(PatchError):
        NeuronPatch(good.manifest, {}).save_pretrained(tmp_path / "patch")
    assert NeuronPatch.from_pretrained(tmp_path / "patch").digest == good.digest
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(sites=["gatee.0"]), "sites: unknown place 'gatee'"),
        (lambda record: record.update(sites=["up.1", "gate.9"]), "holds no gate.9/rows"),
        (lambda record: record.pop("schema_version"), "schema_version"),
        (lambda record: record.update(schema_version=9), "schema version 9, this library reads 1"),
        (lambda record: record.update(tensors_digest="0"), "has SHA-256"),
        (lambda record: record.update(extra=1), "extra"),
    ],
)
def test_a_damaged_patch_is_refused(
    tiny_loaded: LoadedModel, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    random_patch(tiny_loaded).save_pretrained(tmp_path / "patch")
    file = tmp_path / "patch" / "patch.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(PatchError, match=message):
        NeuronPatch.from_pretrained(tmp_path / "patch")


def test_another_model_is_refused_with_both_values(tiny_loaded: LoadedModel) -> None:
    patch = random_patch(tiny_loaded)
    with torch.no_grad():
        next(iter(tiny_loaded.model.parameters())).add_(1)
    with pytest.raises(MismatchError, match=r"weight_digest is '.*', expected '.*'"):
        patch.check_model(fingerprint(tiny_loaded))


@pytest.mark.parametrize(
    ("rows", "clusters", "vectors", "message"),
    [
        ([1, 1], [0, 0], torch.ones(1, 4), "ascending"),
        ([-1, 1], [0, 0], torch.ones(1, 4), "not negative"),
        ([1, 2], [0, 1], torch.ones(1, 4), "clusters run from 0 to 1, but there are 1 vectors"),
        ([1, 2], [0], torch.ones(1, 4), r"\[2\], \[1\]"),
        ([], [], torch.ones(1, 4), "R > 0"),
        ([1], [0], torch.ones(1, 4).double(), "float64"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(
    rows: list[int], clusters: list[int], vectors: torch.Tensor, message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        PatchTarget(torch.tensor(rows, dtype=torch.int64), torch.tensor(clusters, dtype=torch.int64), vectors)
