"""Sets of neurons on disk: what is written is read back, and what is damaged is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nest.neurons import ModuleRecord, Neurons, NeuronSet
from spider_sense.errors import PatchError
from spider_sense.folders import sha256
from spider_sense.models import LoadedModel
from spider_sense.types import Site

GATE, UP = Site(0, "gate"), Site(1, "up")


@pytest.fixture
def neurons(tiny_loaded: LoadedModel, tiny_neurons: Any) -> NeuronSet:
    generator = torch.Generator().manual_seed(0)
    profiles = {GATE: torch.randn(5, 8, generator=generator), UP: torch.randn(2, 8, generator=generator)}
    made: NeuronSet = tiny_neurons.neuron_set(tiny_loaded, profiles)
    silent = ModuleRecord(rows=48, selected=0, held_out_auroc=None)
    modules = {**made.manifest.modules, "up.0": silent}
    return NeuronSet(made.manifest.model_copy(update={"modules": modules}), made.sites)


def grouped(neurons: NeuronSet) -> NeuronSet:
    clusters = {GATE: torch.tensor([0, 2, 1, 0, 2]), UP: torch.tensor([0, 0])}
    sites = {site: replace(found, cluster_R=clusters[site]) for site, found in neurons.sites.items()}
    return NeuronSet(neurons.manifest.model_copy(update={"grouping": {"method": "kmeans"}}), sites)


@pytest.mark.parametrize("change", [lambda neurons: neurons, grouped])
def test_round_trip(change: Callable[[NeuronSet], NeuronSet], neurons: NeuronSet, tmp_path: Path) -> None:
    written = change(neurons)
    saved = written.save_pretrained(tmp_path / "neurons")
    read = NeuronSet.from_pretrained(tmp_path / "neurons")
    assert read.manifest == saved.manifest
    assert read.manifest.model_copy(update={"tensors_digest": ""}) == written.manifest
    assert list(read.sites) == [GATE, UP]
    for site, found in written.sites.items():
        assert torch.equal(read.sites[site].neuron_R, found.neuron_R)
        assert torch.equal(read.sites[site].score_R, found.score_R)
        assert read.sites[site].profile_RN.dtype == torch.float32
        assert torch.equal(read.sites[site].profile_RN, found.profile_RN.half().float())
        clusters = read.sites[site].cluster_R
        assert (clusters is None) == (found.cluster_R is None)
        assert clusters is None or found.cluster_R is None or torch.equal(clusters, found.cluster_R)


def test_counts(neurons: NeuronSet) -> None:
    assert (neurons.count, neurons.total_rows, neurons.clusters) == (7, 3 * 48, 0)
    assert neurons.share == 7 / 144
    assert grouped(neurons).clusters == 3 + 1


def test_saving_replaces_an_older_set(neurons: NeuronSet, tmp_path: Path) -> None:
    grouped(neurons).save_pretrained(tmp_path / "neurons")
    assert neurons.save_pretrained(tmp_path / "neurons").clusters == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["neurons", "neurons.json", "neurons.safetensors"]


def test_a_folder_of_something_else_is_not_replaced(neurons: NeuronSet, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PatchError, match="is no set of neurons, so it is not replaced"):
        neurons.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def exchanged(folder: Path) -> None:
    save_file({"gate.0/rows": torch.arange(5)}, folder / "neurons.safetensors")


def without_scores(folder: Path) -> None:
    tensors = load_file(folder / "neurons.safetensors")
    del tensors["gate.0/scores"]
    save_file(tensors, folder / "neurons.safetensors")
    rewrite(folder, tensors_digest=sha256(folder / "neurons.safetensors"))


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "neurons.safetensors")
    tensors["up.1/profiles"][0, 0] = torch.nan
    save_file(tensors, folder / "neurons.safetensors")
    rewrite(folder, tensors_digest=sha256(folder / "neurons.safetensors"))


def rewrite(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "neurons.json").read_text())
    (folder / "neurons.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "neurons.json").unlink(), "neurons.json does not exist; .* `nest find`"),
        (lambda folder: (folder / "neurons.safetensors").unlink(), "neurons.safetensors does not exist"),
        (lambda folder: (folder / "neurons.json").write_text("{"), "neurons.json: file: "),
        (lambda folder: rewrite(folder, colour="red"), "colour: Extra inputs"),
        (lambda folder: rewrite(folder, schema_version=9), "schema version 9, this library reads 1; find the set"),
        (exchanged, "has SHA-256 .* the manifest says"),
        (without_scores, "holds no gate.0/scores; find or copy"),
        (with_nan, "up.1/profiles holds numbers that are not finite"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], object], message: str, neurons: NeuronSet, tmp_path: Path
) -> None:
    folder = tmp_path / "neurons"
    neurons.save_pretrained(folder)
    damage(folder)
    with pytest.raises(PatchError, match=message):
        NeuronSet.from_pretrained(folder)


ROWS, SCORES, PROFILES = torch.tensor([1, 4]), torch.ones(2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((ROWS.int(), SCORES, PROFILES), r"rows are torch.int32 \[2\]"),
        ((ROWS[:0], SCORES[:0], PROFILES[:0]), r"must be int64 \[R\], R > 0"),
        ((ROWS.flip(0), SCORES, PROFILES), "must be ascending"),
        ((ROWS - 2, SCORES, PROFILES), "not negative"),
        ((ROWS, SCORES[:1], PROFILES), r"2 rows, but scores \(1,\)"),
        ((ROWS, SCORES, PROFILES[:1]), r"profiles \(1,\)"),
        ((ROWS, SCORES, PROFILES, torch.zeros(2)), r"clusters are torch.float32 \[2\]"),
        ((ROWS, SCORES, PROFILES, torch.zeros(3, dtype=torch.int64)), "one for each of 2 rows"),
        ((ROWS, SCORES, PROFILES, torch.tensor([0, -1])), "a cluster is -1; clusters are numbered from 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        Neurons(*fields)
