"""The live patch on a GPU, in Triton's interpreter: it is what the op does, with one product for a block."""

import numpy as np
import pytest
import torch
from torch import Tensor

import spider_sense.device_patch
from sense_kernels import PatchDots, launch_patch_dots, patch_rows
from spider_sense.device_patch import DevicePatch
from spider_sense.patch import PatchTarget
from spider_sense.types import Site

GATE, UP, NEXT = Site.parse("gate.0"), Site.parse("up.0"), Site.parse("gate.1")
STARTS = {GATE: 0, UP: 7, NEXT: 0}


def target(seed: int, clusters: int) -> PatchTarget:
    generator = torch.Generator().manual_seed(seed)
    neuron_R = torch.randperm(40, generator=generator)[:9].sort().values
    return PatchTarget(neuron_R, torch.arange(9) % clusters, torch.randn(clusters, 33, generator=generator))


TARGETS = {GATE: target(0, 2), UP: target(1, 3), NEXT: target(2, 1)}


def by_op(site: Site, output: Tensor, hidden: Tensor, gate_T: Tensor) -> Tensor:
    want, chosen = output.clone(), TARGETS[site]
    patch_rows(want, hidden, chosen.vectors_KD, chosen.neuron_R + STARTS[site], chosen.cluster_R, gate_T, 0.7)
    return want


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []

    def counted(hidden: Tensor, vectors: Tensor, gate_T: Tensor) -> PatchDots:
        seen.append(hidden)
        return launch_patch_dots(hidden, vectors, gate_T)

    monkeypatch.setattr(spider_sense.device_patch, "launch_patch_dots", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_op_with_one_product_a_block(launches: list[Tensor], dtype: torch.dtype) -> None:
    patch = DevicePatch(TARGETS, STARTS, 0.7, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for rows, expected in ((5, [1.0, 0.0, 0.5, 0.0, 0.0]), (2, [0.0, 1.0])):
        gate_T, hidden = torch.zeros(8), torch.randn(rows, 33, generator=generator).to(dtype)
        gate_T[:rows] = torch.tensor(expected)
        hidden[gate_T[:rows] == 0] = torch.nan
        for site in TARGETS:
            output = torch.randn(rows, 47, generator=generator).to(dtype)
            want = by_op(site, output, hidden, gate_T)
            patch.patch(site, output, hidden, gate_T)
            torch.testing.assert_close(output, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
            assert torch.equal(output[gate_T[:rows] == 0], want[gate_T[:rows] == 0])
        patch.rest()
    assert [len(hidden) for hidden in launches] == [5, 5, 2, 2]


def test_another_input_of_the_same_block_is_multiplied_anew(launches: list[Tensor]) -> None:
    patch, gate_T = DevicePatch(TARGETS, STARTS, 0.7, torch.device("cpu")), torch.ones(3)
    first, second = torch.randn(2, 3, 33, generator=torch.Generator().manual_seed(4)).unbind()
    for site, hidden in ((GATE, first), (UP, second)):
        output = torch.zeros(3, 47)
        patch.patch(site, output, hidden, gate_T)
        np.testing.assert_allclose(output, by_op(site, torch.zeros(3, 47), hidden, gate_T), rtol=1e-5, atol=1e-5)
    assert len(launches) == 2
