"""Low-rank additions: as hooks, folded into the weights and as a patch they are one and the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from nest.activations import projection_sites
from nest.delta import Delta, Deltas, lora_deltas, patch_targets, shared_deltas
from nest.neurons import NeuronManifest, Neurons, NeuronSet
from spider_sense.errors import PatchError
from spider_sense.experts import resolve_expert
from spider_sense.sites import resolve
from spider_sense.types import Site

ROWS, CLUSTERS = torch.tensor([1, 4, 6]), torch.tensor([0, 1, 0])


def neuron_set(model: nn.Module, cluster_R: Tensor | None = CLUSTERS) -> NeuronSet:
    """Return three rows of each gate and up projection of block 1, of a mixture in experts 0 and 2."""
    sites = [site for site in projection_sites(model) if site.layer == 1 and site.expert in (None, 0, 2)]
    group = Neurons(ROWS, torch.ones(3), torch.zeros(3, 0), cluster_R)
    # Only the rows are read here.
    return NeuronSet(NeuronManifest.model_construct(), dict.fromkeys(sites, group))


def filled(deltas: Deltas) -> Deltas:
    """Give every trained number a value."""
    generator = torch.Generator().manual_seed(0)
    for parameter in deltas.parameters():
        parameter.data.normal_(generator=generator).mul_(0.3)
    return deltas


def logits(model: PreTrainedModel) -> Tensor:
    """Run a fixed prompt."""
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(3, 12)[None]).logits
    return result


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_hooks_and_folding_are_the_same_and_leave_no_trace(
    kind: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_model(kind)
    bare, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    deltas = filled(shared_deltas(model, neuron_set(model)))
    deltas.alpha = 0.7
    with deltas.hooked():
        hooked = logits(model)
    with deltas.folded():
        folded = logits(model)
    assert (hooked - bare).abs().max() > 1e-3
    torch.testing.assert_close(hooked, folded, atol=1e-5, rtol=1e-5)
    assert logits(model).equal(bare)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["phi3", "mixtral"])
def test_a_patch_says_the_same_rows_and_vectors(kind: str, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model(kind)
    neurons = neuron_set(model)
    deltas = filled(shared_deltas(model, neurons))
    for delta, (site, target) in zip(deltas, patch_targets(deltas, neurons).items(), strict=True):
        change_FD = delta.up_FK @ delta.down_KD
        start = resolve(model, site).start if site.expert is None else resolve_expert(model, site).part(site).start
        assert change_FD[start + target.neuron_R].equal(target.delta_RD())
        assert int((change_FD != 0).any(1).sum()) == len(ROWS)


def test_all_rows_of_a_cluster_share_a_gradient(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    deltas = shared_deltas(model, neuron_set(model))
    assert deltas.count() == 2 * 2 * model.config.hidden_size
    with deltas.hooked():
        model(input_ids=torch.arange(3, 12)[None]).logits.square().mean().backward()
    for delta in deltas:
        assert delta.down_KD.grad is not None
        assert (delta.down_KD.grad.abs().amax(1) > 0).all()


def test_lora_starts_as_nothing_and_trains_both_sides(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    modules: dict[str, nn.Module] = {"gate": resolve(model, Site(0, "gate")).module}
    one, other = lora_deltas(modules, 2, seed=3), lora_deltas(modules, 2, seed=3)
    with one.hooked():
        assert logits(model).equal(logits(model))
    assert [value.tolist() for value in one.parameters()] == [value.tolist() for value in other.parameters()]
    (delta,) = one
    assert one.count() == delta.down_KD.numel() + delta.up_FK.numel()
    assert not delta.up_FK.any()


def test_neurons_that_are_not_grouped_are_refused(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    with pytest.raises(PatchError, match=r"gate\.1 are not grouped"):
        shared_deltas(model, neuron_set(model, None))


def test_an_error_inside_the_block_restores_the_weights(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    bare = logits(model)
    deltas = filled(shared_deltas(model, neuron_set(model)))

    def fail() -> Any:
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"), deltas.folded():
        fail()
    with pytest.raises(RuntimeError, match="cut off"), deltas.hooked():
        fail()
    assert logits(model).equal(bare)


def test_two_additions_to_one_projection_add_up(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    module = resolve(tiny_model("llama"), Site(0, "up")).module
    weight = module.weight
    assert isinstance(weight, Tensor)
    before, parts = (
        weight.detach().clone(),
        [Delta(module, torch.ones(1, weight.shape[1]), torch.ones(len(weight), 1))] * 2,
    )
    with Deltas(parts).folded():
        torch.testing.assert_close(weight.detach(), before + 2)


class Allocated(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is not a view of one that was there before."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.most = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_folding_keeps_only_the_rows_that_change(kind: str, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model(kind)
    deltas = filled(shared_deltas(model, neuron_set(model)))
    storages = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    with Allocated(storages) as seen, deltas.folded():
        pass
    # Which rows a cluster has is a table of two numbers a row.
    assert seen.most <= max(len(ROWS) * 32, next(iter(deltas)).up_FK.numel())
