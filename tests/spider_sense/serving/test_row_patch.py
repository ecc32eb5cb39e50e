"""The patch in a model as vLLM lays it out: every rank its own neurons, named rows from a position on, no others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spider_sense.errors import PatchError, SiteError, SpiderSenseError
from spider_sense.patch import PatchTarget
from spider_sense.serving.row_patch import RowPatch
from spider_sense.types import Site

WIDTH, NEURONS, ALPHA, ROWS = 32, 48, 0.5, 16
SITES = (Site(0, "gate"), Site(0, "up"), Site(1, "up"))


class Projection(nn.Module):
    """A rank's share of a projection, as much of vLLM's as is touched."""

    def __init__(self, weights: list[Tensor], rank: int, ranks: int) -> None:
        super().__init__()
        self.input_size, self.tp_rank, self.tp_size, self.gather_output = WIDTH, rank, ranks, False
        self.output_size = sum(map(len, weights))
        if len(weights) > 1:
            self.output_sizes = [len(weight) for weight in weights]
        self.weight = torch.cat([weight.chunk(ranks)[rank] for weight in weights])

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, None]:
        return hidden_TD @ self.weight.T, None


class TinyDecoderLayer(nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, merged: bool, rank: int, ranks: int) -> None:
        super().__init__()
        self.mlp: Any = nn.Module()
        if merged:
            self.mlp.gate_up_proj = Projection([gate, up], rank, ranks)
        else:
            self.mlp.gate_proj = Projection([gate], rank, ranks)
            self.mlp.up_proj = Projection([up], rank, ranks)

    def forward(self, hidden_TD: Tensor) -> list[Tensor]:
        """Return gate and up, one after the other."""
        if hasattr(self.mlp, "gate_up_proj"):
            return list(self.mlp.gate_up_proj(hidden_TD)[0].chunk(2, -1))
        return [self.mlp.gate_proj(hidden_TD)[0], self.mlp.up_proj(hidden_TD)[0]]


def weights() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(NEURONS, WIDTH, generator=draw), torch.randn(NEURONS, WIDTH, generator=draw)) for _ in range(2)
    ]


def model(merged: bool = True, rank: int = 0, ranks: int = 1) -> Any:
    whole = nn.Module()
    whole.layers = nn.ModuleList(TinyDecoderLayer(gate, up, merged, rank, ranks) for gate, up in weights())
    return whole


def outputs(what: Any, hidden_TD: Tensor) -> list[Tensor]:
    """Return gate and up of the first block, then those of the second."""
    return [half for layer in what.layers for half in layer(hidden_TD)]


@pytest.fixture
def patch(tiny_patches: Any) -> Any:
    rows = {SITES[0]: [0, 5, 23, 24, 30, 47], SITES[1]: [3, 25, 26], SITES[2]: [1, 2]}
    targets = {site: tiny_patches.target(own, seed=place) for place, (site, own) in enumerate(rows.items())}
    return patch_of(targets)


def patch_of(targets: dict[Site, PatchTarget]) -> Any:
    """Return as much of a patch as is read."""
    return SimpleNamespace(targets=targets)


def wanted(patch: Any, hidden_TD: Tensor) -> list[Tensor]:
    """Say the patch by hand: W[rows] += alpha u."""
    found = weights()
    for site, target in patch.targets.items():
        found[site.layer][site.place == "up"][target.neuron_R] += ALPHA * target.delta_RD()
    return [hidden_TD @ weight.T for pair in found for weight in pair]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("merged", [True, False])
def test_all_ranks_together_patch_what_the_patch_names(patch: Any, merged: bool, ranks: int) -> None:
    hidden_TD = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    want, shares = wanted(patch, hidden_TD), []
    # Rows of "old" begin at position 7, and it is patched from 8 on; "new" is patched whole, "other" is not.
    patched, kept = [1, 2, 6, 7, 8], [0, 3, 4, 5]
    for rank in range(ranks):
        what = model(merged, rank, ranks)
        bare = outputs(what, hidden_TD)
        live = RowPatch(what, patch, ALPHA, ROWS)
        for name, places in {"nobody": [], "some": patched}.items():
            live.begin({} if name == "nobody" else {"old": 8, "new": 0})
            live.rows(["old", "other", "new"], [0, 3, 6, 9], [7, 2, 0])
            found = outputs(what, hidden_TD)
            rest = kept if places else list(range(9))
            assert all(torch.equal(f[rest], b[rest]) for f, b in zip(found, bare, strict=True))
        shares.append(found)
        live.rest()
        assert all(map(torch.equal, outputs(what, hidden_TD), bare))
    for halves, half in zip(zip(*shares, strict=True), want, strict=True):
        torch.testing.assert_close(torch.cat(halves, 1)[patched], half[patched], rtol=1e-5, atol=1e-5)


def test_rows_that_an_earlier_step_named_are_let_go(patch: Any) -> None:
    what = model()
    live = RowPatch(what, patch, ALPHA, ROWS)
    where = live.strengths.tensor.data_ptr()
    live.begin({"a": 0})
    live.rows(["a"], [0, ROWS], [0])
    assert live.strengths.tensor.tolist() == [1.0] * ROWS
    # A step may be padded with rows of no request, and a later one may begin before the first patched position.
    live.rows(["b", "a"], [0, 2, 3, 3], [5, 9])
    assert live.strengths.tensor.tolist() == [0.0, 0.0, 1.0] + [0.0] * (ROWS - 3)
    live.begin({"a": 12})
    live.rows(["a"], [0, 2], [10])
    assert not live.strengths.tensor.any()
    assert live.strengths.tensor.data_ptr() == where


def test_a_patched_request_whose_rows_nobody_named_is_an_error(patch: Any) -> None:
    live = RowPatch(model(), patch, ALPHA, ROWS)
    live.begin({"a": 0, "b": 3})
    live.rows(["a"], [0, 2], [0])
    with pytest.raises(SpiderSenseError, match=r"^b: to be patched, and the engine packed its rows"):
        live.rest()
    assert not live.strengths.tensor.any()
    live.begin({"b": 3})
    live.rows(["a", "b"], [0, 2, 3], [5, 1])
    live.rest()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_size": 33}, "33 inputs"),
        ({"output_sizes": [48, 40]}, r"outputs \[48, 40\]"),
        ({"output_sizes": [48, 48, 48]}, r"outputs \[48, 48, 48\]"),
        ({"output_sizes": [40, 40]}, "more than 47"),
        ({"gather_output": True}, "a Projection computes it"),
    ],
)
def test_another_layout_is_refused(patch: Any, change: dict[str, Any], says: str) -> None:
    what = model()
    for name, value in change.items():
        setattr(what.layers[0].mlp.gate_up_proj, name, value)
    with pytest.raises(SiteError, match=says):
        RowPatch(what, patch, ALPHA, ROWS)


def test_a_model_without_the_projection_is_refused(patch: Any, tiny_patches: Any) -> None:
    what = model()
    del what.layers[1].mlp.gate_up_proj
    with pytest.raises(SiteError, match=r"up\.1 cannot be patched in vLLM: its block has neither mlp\.gate_up_proj"):
        RowPatch(what, patch, ALPHA, ROWS)
    for site, says in {Site(2, "up"): "blocks 0 to 1", Site(0, "resid"): "cannot be patched"}.items():
        with pytest.raises(SiteError, match=says):
            RowPatch(model(), patch_of({site: tiny_patches.target([1])}), ALPHA, ROWS)


def test_a_patch_of_experts_is_refused(tiny_patches: Any) -> None:
    inside = patch_of({Site(1, "up", 3): tiny_patches.target([1])})
    with pytest.raises(
        PatchError, match=r"changes up\.1\.3, .* single requests in vLLM; fold .* nest apply or nest merge"
    ):
        RowPatch(model(), inside, ALPHA, ROWS)
