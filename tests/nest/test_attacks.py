"""Attacks on a running model: what is ablated is gone, and nothing stays behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nest.attacks import direction_ablated, neurons_off
from spider_sense.errors import SiteError
from spider_sense.patching import projection_FD
from spider_sense.sites import available_places, resolve
from spider_sense.types import Site

IDS = torch.arange(3, 23).view(2, 10)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(IDS).logits
    return output


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def seen_at(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Record what each module puts out, after every hook that was there before."""
    seen: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(read) for module in modules]
    yield seen
    for handle in handles:
        handle.remove()


def test_the_direction_is_gone_from_the_residual_stream(architecture: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(architecture)
    before, count = logits(model), hooks(model)
    direction_D = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 7
    unit_D = direction_D / direction_D.norm()
    blocks = [resolve(model, Site(layer, "resid")).module for layer in (0, 1)]
    with seen_at(blocks) as plain:
        logits(model)
    assert all(float((hidden @ unit_D).abs().max()) > 1e-3 for hidden in plain)
    with direction_ablated(model, direction_D), seen_at(blocks) as ablated:
        changed = logits(model)
    assert len(ablated) == 2
    assert all(float((hidden @ unit_D).abs().max()) < 1e-5 for hidden in ablated)
    assert not torch.allclose(changed, before, atol=1e-4)
    assert hooks(model) == count
    assert torch.equal(logits(model), before)


def test_norms_do_not_read_the_direction(tiny_model: Callable[[str], Any]) -> None:
    model, read = tiny_model("llama"), list[Tensor]()
    unit_D = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    with direction_ablated(model, unit_D):
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        logits(model)
    assert len(read) == 4
    assert all(float((hidden @ unit_D).abs().max()) < 1e-5 for hidden in read)


def test_hooks_are_removed_after_an_error(tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="stop"), direction_ablated(model, torch.ones(32)):
        raise RuntimeError("stop")
    with (
        pytest.raises(SiteError),
        neurons_off(model, {Site(0, "up"): torch.tensor([1]), Site(9, "up"): torch.tensor([1])}),
    ):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize("direction_D", [torch.ones(31), torch.zeros(32), torch.full((32,), torch.nan)])
def test_a_direction_that_is_none_is_refused(tiny_model: Callable[[str], Any], direction_D: Tensor) -> None:
    with (
        pytest.raises(SiteError, match="cannot be ablated; give 32 numbers"),
        direction_ablated(tiny_model("llama"), direction_D),
    ):
        pass


def test_neurons_that_are_off_put_out_nothing(architecture: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(architecture)
    places = [place for place in available_places(model) if place in ("gate", "up")]
    rows = {Site(1, place): torch.tensor([0, 5, 47]) for place in places}
    if not rows:
        # A mixture has no row that all tokens pass; see the next test.
        with (
            pytest.raises(SiteError, match=r"layer 1 has experts; write gate\.1\.0 for expert 0"),
            neurons_off(model, {Site(1, "gate"): torch.tensor([0])}),
        ):
            pass
        return
    before, resolved = logits(model), [resolve(model, site) for site in rows]
    with neurons_off(model, rows), seen_at([place.module for place in resolved]) as seen:
        changed = logits(model)
    for place, output in zip(resolved, seen, strict=True):
        cut = output[..., place.start : place.stop]
        assert torch.equal(cut[..., [0, 5, 47]], torch.zeros_like(cut[..., :3]))
        assert bool((cut[..., 1] != 0).all())
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_neurons_of_experts_that_are_off_are_those_with_weights_of_zero(
    name: str, tiny_model: Callable[[str], Any]
) -> None:
    model = tiny_model(name)
    rows = {
        Site(1, "gate", 2): torch.tensor([0, 5]),
        Site(1, "up", 2): torch.tensor([3]),
        Site(0, "up", 1): torch.tensor([15]),
    }
    before = logits(model)
    with neurons_off(model, rows):
        changed = logits(model)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for site, row_R in rows.items():
            projection_FD(model, site)[row_R] = 0
    torch.testing.assert_close(changed, logits(model), rtol=1e-5, atol=1e-6)
    assert (changed - before).abs().max() > 1e-4


def test_rows_that_an_expert_lacks_are_refused(tiny_model: Callable[[str], Any]) -> None:
    with (
        pytest.raises(SiteError, match=r"row 16 of up\.1\.2 does not exist; it has rows 0 to 15"),
        neurons_off(tiny_model("qwen3_moe"), {Site(1, "up", 2): torch.tensor([16])}),
    ):
        pass


@pytest.mark.parametrize(
    ("site", "row", "message"),
    [
        (Site(0, "resid"), 1, "no neurons to switch off"),
        (Site(0, "up"), 48, "row 48 of up.0 does not exist; it has rows 0 to 47"),
    ],
)
def test_rows_that_are_none_are_refused(tiny_model: Callable[[str], Any], site: Site, row: int, message: str) -> None:
    with pytest.raises(SiteError, match=message), neurons_off(tiny_model("llama"), {site: torch.tensor([row])}):
        pass
