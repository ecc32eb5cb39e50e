from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spider_sense.errors import SiteError
from spider_sense.experts import experts_of
from spider_sense.layouts import LAYOUTS, positions
from spider_sense.sites import (
    ResolvedSite,
    available_places,
    layer_count,
    resolve,
    resolve_all,
    shortened,
    unwrap,
)
from spider_sense.types import Place, Site

Builder = Callable[[str], PreTrainedModel]

WIDTH, LAYERS = 32, 2
MLP_WIDTH = {"gpt2": 128}
MIXTURES = ("mixtral", "qwen3_moe")
UNGATED = ("gpt2", "gpt_neox")
NORM_OF_MLP = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
}
FINAL_NORM = {
    "gemma3": "model.language_model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
}
DOWN = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}
ACTIVATION = {"gpt2": "act", "gpt_neox": "act", "phi3": "activation_fn"}


def every_site(model: nn.Module) -> list[Site]:
    return [Site(layer, place) for layer in range(layer_count(model)) for place in available_places(model)]


def read(model: Any, points: Iterable[ResolvedSite]) -> tuple[dict[Site, Tensor], Any]:
    """Run one forward over two rows of five tokens; return what each site saw, and the model's own output."""
    seen: dict[Site, Tensor] = {}

    def keep(point: ResolvedSite, tensor: Any) -> None:
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        seen[point.site] = tensor[..., point.start : point.stop].clone()

    handles = [
        point.module.register_forward_pre_hook(lambda _m, args, point=point: keep(point, args))
        if point.reads == "input"
        else point.module.register_forward_hook(lambda _m, _a, out, point=point: keep(point, out))
        for point in points
    ]
    try:
        with torch.no_grad():
            output = model(torch.arange(3, 13).view(2, 5), output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def output_of(model: Any, path: str) -> Tensor:
    site = Site(0, "resid")
    point = ResolvedSite(
        site=site, module=model.get_submodule(path), path=path, reads="output", start=0, stop=1_000_000
    )
    return read(model, [point])[0][site]


def test_the_table_and_the_tiny_models_cover_each_other(tiny_model: Builder, architecture: str) -> None:
    assert architecture in LAYOUTS
    assert tiny_model(architecture).config.model_type == architecture


def test_the_table_is_sorted_and_has_the_promised_architectures() -> None:
    assert list(LAYOUTS) == sorted(LAYOUTS)
    assert len(LAYOUTS) == 13


def test_every_architecture_has_the_places_it_should(tiny_model: Builder, architecture: str) -> None:
    expected: tuple[Place, ...] = ("resid", "mlp_in", "gate", "up")
    if architecture in MIXTURES:
        expected = ("resid", "mlp_in")
    if architecture in UNGATED:
        expected = ("resid", "mlp_in", "up")
    assert available_places(tiny_model(architecture)) == expected


def test_every_site_resolves_to_the_module_its_path_names(tiny_model: Builder, architecture: str) -> None:
    model = tiny_model(architecture)
    assert layer_count(model) == LAYERS
    for site in every_site(model):
        point = resolve(model, site)
        assert point.site == site
        assert model.get_submodule(point.path) is point.module
        assert f".{site.layer}" in point.path


def test_every_site_reads_tensors_of_its_width(tiny_model: Builder, architecture: str) -> None:
    model = tiny_model(architecture)
    points = resolve_all(model, every_site(model))
    seen, _ = read(model, points)
    widths = {"resid": WIDTH, "mlp_in": WIDTH}
    for point in points:
        width = widths.get(point.site.place, MLP_WIDTH.get(architecture, 48))
        assert point.width == width
        assert seen[point.site].shape == (2, 5, width)


def test_resid_is_what_transformers_calls_hidden_states(tiny_model: Builder, architecture: str) -> None:
    model = tiny_model(architecture)
    seen, output = read(model, resolve_all(model, [Site(layer, "resid") for layer in range(LAYERS)]))
    assert len(output.hidden_states) == LAYERS + 1
    torch.testing.assert_close(seen[Site(0, "resid")], output.hidden_states[1], rtol=0, atol=0)
    norm = model.get_submodule(FINAL_NORM.get(architecture, "model.norm"))
    with torch.no_grad():
        last = norm(seen[Site(1, "resid")])
    torch.testing.assert_close(last, output.hidden_states[-1], rtol=0, atol=0)


def test_a_shortened_model_computes_the_same_up_to_its_end_and_is_whole_again(
    tiny_model: Builder, architecture: str
) -> None:
    model, first, last = tiny_model(architecture), Site(0, "resid"), Site(LAYERS - 1, "resid")
    points = resolve_all(model, [first, last])
    whole, output = read(model, points)
    with suppress(KeyboardInterrupt), shortened(model, 1):
        seen, _ = read(model, points)
        raise KeyboardInterrupt
    assert seen.keys() == {first}
    torch.testing.assert_close(seen[first], whole[first], rtol=0, atol=0)
    torch.testing.assert_close(read(model, points)[1].logits, output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_mlp_in_is_the_output_of_the_norm_before_the_mlp(tiny_model: Builder, architecture: str, layer: int) -> None:
    model = tiny_model(architecture)
    point = resolve(model, Site(layer, "mlp_in"))
    block = point.path.removesuffix(".mlp")
    norm = f"{block}.{NORM_OF_MLP.get(architecture, 'post_attention_layernorm')}"
    seen, _ = read(model, [point])
    torch.testing.assert_close(seen[point.site], output_of(model, norm), rtol=0, atol=0)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_gate_and_up_rebuild_the_output_of_the_mlp(tiny_model: Builder, architecture: str, layer: int) -> None:
    model = tiny_model(architecture)
    if architecture in MIXTURES:
        assert available_places(model) == ("resid", "mlp_in")
        return
    points = resolve_all(model, [site for site in every_site(model) if site.layer == layer])
    seen, _ = read(model, points)
    path = points[1].path
    mlp: Any = model.get_submodule(path)
    activate, down = (
        getattr(mlp, ACTIVATION.get(architecture, "act_fn")),
        getattr(mlp, DOWN.get(architecture, "down_proj")),
    )
    with torch.no_grad():
        up = seen[Site(layer, "up")]
        hidden = activate(up) if architecture in UNGATED else activate(seen[Site(layer, "gate")]) * up
        rebuilt = down(hidden)
    torch.testing.assert_close(rebuilt, output_of(model, path))


def test_the_fused_projection_of_phi3_is_cut_in_two(tiny_model: Builder) -> None:
    gate, up = resolve_all(tiny_model("phi3"), [Site(1, "gate"), Site(1, "up")])
    assert gate.module is up.module
    assert (gate.start, gate.stop, up.start, up.stop) == (0, 48, 48, 96)


def test_resolve_all_keeps_the_order(tiny_model: Builder) -> None:
    sites = [Site(1, "up"), Site(0, "resid"), Site(1, "mlp_in")]
    assert [point.site for point in resolve_all(tiny_model("llama"), sites)] == sites


def test_a_compiled_model_resolves_to_the_modules_inside(tiny_model: Builder) -> None:
    model = tiny_model("llama")
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert unwrap(model) is model
    for site in every_site(model):
        inside, plain = resolve(compiled, site), resolve(model, site)
        assert inside.path == plain.path
        assert inside.module is plain.module


def test_a_block_compiled_by_itself_is_looked_into(tiny_model: Builder) -> None:
    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert resolve(model, Site(0, "gate")).module is gate
    assert resolve(model, Site(0, "resid")).module is model.model.layers[0]


def test_an_unknown_architecture_is_told_the_known_ones(tiny_model: Builder) -> None:
    model = tiny_model("llama")
    model.config.model_type = "lama"
    with pytest.raises(SiteError, match=r"LlamaForCausalLM of architecture 'lama'; did you mean 'llama'.*smollm3"):
        resolve(model, Site(0, "resid"))


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(SiteError, match="no sites for Linear"):
        layer_count(nn.Linear(2, 2))


def test_a_layer_out_of_range_is_told_the_range(tiny_model: Builder) -> None:
    with pytest.raises(SiteError, match=r"site resid\.2: the model has layers 0 to 1"):
        resolve(tiny_model("llama"), Site(2, "resid"))
    with pytest.raises(SiteError, match="layers 0 to 1"):
        resolve(tiny_model("llama"), Site(-1, "resid"))


@pytest.mark.parametrize(
    ("name", "place", "has"),
    [("gpt2", "gate", "resid, mlp_in, up"), ("gpt_neox", "gate", "mlp_in, up")],
)
def test_a_place_the_architecture_lacks_is_told_the_others(
    tiny_model: Builder, name: str, place: Place, has: str
) -> None:
    assert place in get_args(Place)
    with pytest.raises(SiteError, match=rf"{name} has no place '{place}'; it has: .*{has}$"):
        resolve(tiny_model(name), Site(0, place))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_told_what_every_token_passes(tiny_model: Builder, name: str) -> None:
    with pytest.raises(SiteError, match=rf"layer 1 of this {name} has experts, and no 'up' .* resid\.1 or mlp_in\.1$"):
        resolve(tiny_model(name), Site(1, "up"))


def test_what_reads_every_token_cannot_read_inside_an_expert(tiny_model: Builder) -> None:
    with pytest.raises(SiteError, match=r"site gate\.1\.3 lies inside an expert.* resid\.1 or mlp_in\.1"):
        resolve(tiny_model("mixtral"), Site(1, "gate", 3))


def test_a_block_of_a_mixture_without_experts_has_gate_and_up(tiny_model: Any) -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    assert experts_of(model, 0) is not None
    assert experts_of(model, 1) is None
    assert resolve(model, Site(1, "up")).module is model.model.layers[1].mlp.up_proj
    with pytest.raises(SiteError, match=r"no 'up' that every token passes"):
        resolve(model, Site(0, "up"))


def test_experts_of_another_width_are_refused(tiny_model: Builder) -> None:
    model = tiny_model("qwen3_moe")
    model.config.moe_intermediate_size = 20
    with pytest.raises(SiteError, match=r"rows in model\.layers\.0\.mlp\.experts\.gate_up_proj is 32, .* says 40"):
        experts_of(model, 0)


@pytest.mark.parametrize("shape", [(4, 32, 16), (2048, 1)])
def test_packed_experts_are_refused(tiny_model: Builder, shape: tuple[int, ...]) -> None:
    model: Any = tiny_model("qwen3_moe")
    packed = torch.zeros(shape, dtype=torch.uint8)
    model.model.layers[0].mlp.experts.gate_up_proj = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(SiteError, match=r"uint8 \[.*unpacked it would be \[4, 32, 32\]; load the model unquantised"):
        experts_of(model, 0)


def test_experts_that_are_not_in_one_tensor_are_refused(tiny_model: Builder) -> None:
    model: Any = tiny_model("mixtral")
    mlp = model.model.layers[0].mlp
    mlp.experts = nn.ModuleList(nn.Linear(32, 96) for _ in range(4))
    with pytest.raises(
        SiteError, match=r"mlp\.experts is a ModuleList that .* one tensor gate_up_proj; .* unquantised"
    ):
        experts_of(model, 0)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_positions_are_those_of_the_text_model(tiny_model: Builder, name: str) -> None:
    assert positions(tiny_model(name)) == 128


def test_a_model_with_blocks_cut_off_is_refused(tiny_model: Builder) -> None:
    model = tiny_model("qwen3")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(SiteError, match=r"number of blocks in model\.layers is 1, but the configuration says 2"):
        resolve(model, Site(0, "resid"))


def test_a_missing_module_is_named_with_its_neighbours(tiny_model: Builder) -> None:
    model = tiny_model("llama")
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(SiteError, match=r"no 'gate_proj' in model\.layers\.1\.mlp of LlamaForCausalLM.*up_proj"):
        resolve(model, Site(1, "gate"))


@pytest.mark.parametrize("place", ["resid", "mlp_in"])
def test_a_residual_stream_of_another_width_is_refused(tiny_model: Builder, place: Place) -> None:
    model = tiny_model("llama")
    model.config.hidden_size = 16
    with pytest.raises(SiteError, match="post_attention_layernorm is 32, but the configuration says 16"):
        resolve(model, Site(0, place))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_a_projection_of_another_width_is_refused(tiny_model: Builder, name: str) -> None:
    model = tiny_model(name)
    model.config.intermediate_size = 40
    with pytest.raises(
        SiteError, match=r"output width of .*0\.mlp\.\w+ is (48|96), but the configuration says (40|80)"
    ):
        resolve(model, Site(0, "up"))


def test_gpt2_with_a_width_of_its_own_is_read(tiny_model: Builder) -> None:
    model = tiny_model("gpt2")
    model.config.n_inner = 96
    with pytest.raises(SiteError, match="is 128, but the configuration says 96"):
        resolve(model, Site(0, "up"))
