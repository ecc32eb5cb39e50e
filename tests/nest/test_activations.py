"""Pooling: what a batch gives is what each prompt gives alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nest.activations import masked_max, pooled_activations, projection_sites
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError, SiteError
from spider_sense.models import LoadedModel
from spider_sense.types import Site

ARCHITECTURES = ("llama", "qwen2", "gemma3_text", "phi3")
Model = Callable[[str], Any]


@pytest.fixture
def prompts(tiny_neurons: Any) -> list[Example]:
    return [*tiny_neurons.prompt_rows(7, None, seed=3)]


@torch.inference_mode()
def outputs_TF(model: Any, module: nn.Module, ids: list[int], mask: list[int] | None = None) -> Tensor:
    """Run one sequence and return what a module puts out."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    attention_mask = None if mask is None else torch.tensor([mask])
    model(input_ids=torch.tensor([ids]), attention_mask=attention_mask, use_cache=False)
    handle.remove()
    return seen[0][0]


def modules(model: Any, layer: int) -> dict[str, tuple[nn.Module, slice]]:
    """Return where gate and up are, looked up by hand."""
    mlp = model.model.layers[layer].mlp
    if hasattr(mlp, "gate_up_proj"):
        half = mlp.gate_up_proj.out_features // 2
        return {"gate": (mlp.gate_up_proj, slice(half)), "up": (mlp.gate_up_proj, slice(half, None))}
    return {"gate": (mlp.gate_proj, slice(None)), "up": (mlp.up_proj, slice(None))}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_row_is_the_maximum_over_the_scored_tokens_of_its_prompt(
    name: str, batch_size: int, tiny_model: Model, tiny_loaded: LoadedModel, prompts: list[Example]
) -> None:
    loaded = replace(tiny_loaded, model=tiny_model(name))
    sites = projection_sites(loaded.model)
    pooled = pooled_activations(loaded, prompts, sites, batch_size=batch_size)
    chat = Chat(loaded.tokenizer)
    assert chat.head
    for site in sites:
        module, part = modules(loaded.model, site.layer)[site.place]
        for row, example in enumerate(prompts):
            rendered = chat.render(example.text)
            expected_F = outputs_TF(loaded.model, module, list(rendered.ids))[rendered.skip :, part].amax(0)
            torch.testing.assert_close(pooled[site][row], expected_F, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_enter_the_maximum(side: str) -> None:
    hidden_BTF = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = [5, 2, 3]
    keep_BT = torch.zeros(3, 5, dtype=torch.bool)
    for row, length in enumerate(lengths):
        cut = slice(5 - length, 5) if side == "left" else slice(length)
        keep_BT[row, cut] = True
    pooled_BF = masked_max(hidden_BTF.masked_fill(~keep_BT[..., None], 1e6), keep_BT)
    for row, length in enumerate(lengths):
        alone_TF = hidden_BTF[row, -length:] if side == "left" else hidden_BTF[row, :length]
        assert torch.equal(pooled_BF[row], alone_TF.amax(0))


def test_skipped_tokens_do_not_count(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    site, head = Site(0, "gate"), len(Chat(tiny_loaded.tokenizer).head)
    before = pooled_activations(tiny_loaded, prompts, [site])[site]
    louder_T1 = torch.where(torch.arange(100) < head, 1e3, 1.0)[:, None]
    gate = tiny_loaded.model.model.layers[0].mlp.gate_proj
    hook = gate.register_forward_pre_hook(lambda _, args: (args[0] * louder_T1[: args[0].shape[1]],))
    louder = pooled_activations(tiny_loaded, prompts, [site])[site]
    raw = pooled_activations(tiny_loaded, prompts, [site], pool="raw", batch_size=1)[site]
    hook.remove()
    assert torch.equal(louder, before)
    assert raw.max() > 10 * before.max()


def test_raw_pools_padding_too(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    site = Site(1, "up")
    pooled = pooled_activations(tiny_loaded, prompts[:2], [site], pool="raw", batch_size=2)[site]
    ids = [list(Chat(tiny_loaded.tokenizer).render(example.text).ids) for example in prompts[:2]]
    longest = max(map(len, ids))
    assert len(set(map(len, ids))) == 2
    for row, own in enumerate(ids):
        padding = longest - len(own)
        mask = [0] * padding + [1] * len(own)
        module = tiny_loaded.model.model.layers[1].mlp.up_proj
        output_TF = outputs_TF(tiny_loaded.model, module, [0] * padding + own, mask)
        torch.testing.assert_close(pooled[row], output_TF.amax(0), atol=1e-6, rtol=1e-5)


def test_a_conversation_is_read_whole(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    turns = (("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"))
    example = replace(prompts[0], turns=turns)
    pooled = pooled_activations(tiny_loaded, [example], [Site(0, "gate")])[Site(0, "gate")]
    rendered = Chat(tiny_loaded.tokenizer).render(turns)
    output_TF = outputs_TF(tiny_loaded.model, tiny_loaded.model.model.layers[0].mlp.gate_proj, list(rendered.ids))
    torch.testing.assert_close(pooled[0], output_TF[rendered.skip :].amax(0))


def test_progress_counts_every_prompt(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    counts: list[int] = []
    pooled_activations(tiny_loaded, prompts, [Site(0, "up")], batch_size=3, advance=counts.append)
    assert counts == [3, 3, 1]


def test_no_hook_is_left(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    module = tiny_loaded.model.model.layers[0].mlp.up_proj
    pooled_activations(tiny_loaded, prompts, [Site(0, "up")])
    assert not module._forward_hooks
    with torch.no_grad():
        module.weight[7] = torch.nan
    with pytest.raises(DataError, match=r"up\.0 of example 'row-3-0' is not finite"):
        pooled_activations(tiny_loaded, prompts, [Site(0, "up")])
    assert not module._forward_hooks


def test_sites_are_every_gate_and_up(tiny_model: Model) -> None:
    assert [str(site) for site in projection_sites(tiny_model("phi3"))] == ["gate.0", "up.0", "gate.1", "up.1"]
    assert [str(site) for site in projection_sites(tiny_model("gpt2"))] == ["up.0", "up.1"]


def test_a_layer_that_is_not_there_is_refused(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    with pytest.raises(SiteError, match=r"gate\.9: the model has layers 0 to 1"):
        pooled_activations(tiny_loaded, prompts, [Site(9, "gate")])


@pytest.mark.parametrize(
    ("settings", "message"), [({"max_tokens": 4}, "max_tokens is 4"), ({"batch_size": 0}, "batch_size is 0")]
)
def test_bad_settings_are_refused(
    settings: dict[str, int], message: str, tiny_loaded: LoadedModel, prompts: list[Example]
) -> None:
    with pytest.raises(ConfigError, match=message):
        pooled_activations(tiny_loaded, prompts, [Site(0, "gate")], **settings)  # type: ignore[arg-type]
