import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from spider_sense.errors import MismatchError, SiteError
from spider_sense.fingerprint import Fingerprint, ServingConfig, check_match, fingerprint, serving_config
from spider_sense.models import LoadedModel

Builder = Callable[[str], PreTrainedModel]


def tokenizer(words: int = 60, splits: Any = None, **special: str) -> PreTrainedTokenizerFast:
    vocab = {word: n for n, word in enumerate(["</s>", "<unk>", "Hello", "world", *(f"w{n}" for n in range(words))])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = splits or Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **{"eos_token": "</s>", **special})


@pytest.fixture
def loaded(tiny_model: Builder) -> LoadedModel:
    """A tiny llama with a tokenizer of words and no chat template."""
    return LoadedModel(model=tiny_model("llama"), tokenizer=tokenizer(), source="org/tiny")


def digest_of(model: Any, loaded: LoadedModel) -> str:
    return fingerprint(replace(loaded, model=model)).weight_digest


def test_a_fingerprint_says_what_the_model_is(loaded: LoadedModel) -> None:
    found = fingerprint(loaded)
    assert (found.model_type, found.architecture, found.base_model) == ("llama", "LlamaForCausalLM", "org/tiny")
    assert (found.layers, found.width) == (2, 32)
    assert len(found.weight_digest) == len(found.tokenizer_digest) == 64
    assert found.chat_template_digest is None
    assert Fingerprint.model_validate_json(found.model_dump_json()) == found


def test_every_architecture_has_a_fingerprint_of_its_own(
    tiny_model: Builder, architecture: str, loaded: LoadedModel
) -> None:
    found = fingerprint(replace(loaded, model=tiny_model(architecture)))
    assert (found.model_type, found.layers, found.width) == (architecture, 2, 32)
    assert (found == fingerprint(loaded)) == (architecture == "llama")


def test_an_unsupported_architecture_has_none(loaded: LoadedModel) -> None:
    loaded.model.config.model_type = "bert"
    with pytest.raises(SiteError, match="'bert'"):
        fingerprint(loaded)


def test_weights_loaded_as_bf16_have_the_same_digest(
    tiny_model: Builder, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    loaded.model.save_pretrained(folder)
    reloaded = type(loaded.model).from_pretrained(folder, dtype=torch.bfloat16)
    assert reloaded.dtype == torch.bfloat16
    assert digest_of(reloaded, loaded) == fingerprint(loaded).weight_digest


def test_a_compiled_model_has_the_same_fingerprint(loaded: LoadedModel) -> None:
    compiled: Any = torch.compile(loaded.model, backend="eager")
    assert fingerprint(replace(loaded, model=compiled)) == fingerprint(loaded)


def test_breaking_a_tie_without_changing_weights_keeps_the_digest(loaded: LoadedModel) -> None:
    model = loaded.model
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = digest_of(model, loaded)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    assert digest_of(model, loaded) == tied


def test_a_changed_weight_changes_the_digest(loaded: LoadedModel) -> None:
    before = fingerprint(loaded).weight_digest
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    assert fingerprint(loaded).weight_digest != before


def test_a_slight_fine_tune_of_one_big_matrix_changes_the_digest(loaded: LoadedModel) -> None:
    loaded.model.lm_head = nn.Linear(32, 4096, bias=False)
    before = fingerprint(loaded).weight_digest
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.01)
    assert fingerprint(loaded).weight_digest != before


def test_an_edit_between_the_samples_is_not_seen(loaded: LoadedModel) -> None:
    loaded.model.lm_head = nn.Linear(32, 4096, bias=False)
    before = fingerprint(loaded).weight_digest
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 1] += 1
    assert fingerprint(loaded).weight_digest == before


def test_names_and_shapes_are_part_of_the_digest(loaded: LoadedModel) -> None:
    before = fingerprint(loaded).weight_digest
    weight = loaded.model.lm_head.weight.detach()
    loaded.model.lm_head.weight = nn.Parameter(weight.reshape(32, 64))
    reshaped = fingerprint(loaded).weight_digest
    loaded.model.register_buffer("extra", torch.zeros(1))
    assert len({before, reshaped, fingerprint(loaded).weight_digest}) == 3


def test_integers_of_quantised_layers_are_digested_exactly(loaded: LoadedModel) -> None:
    loaded.model.register_buffer("packed", torch.tensor([2**30], dtype=torch.int32))
    before = fingerprint(loaded).weight_digest
    loaded.model.packed += 1
    assert fingerprint(loaded).weight_digest != before


def test_buffers_that_are_not_saved_are_left_out(loaded: LoadedModel) -> None:
    before = fingerprint(loaded).weight_digest
    loaded.model.register_buffer("scratch", torch.zeros(3), persistent=False)
    assert fingerprint(loaded).weight_digest == before


def test_a_digest_of_many_weights_is_fast(loaded: LoadedModel) -> None:
    loaded.model.lm_head = nn.Linear(1024, 16384, bias=False)
    began = time.perf_counter()
    fingerprint(loaded)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(tokenizer(words=61), id="one word more"),
        pytest.param(tokenizer(splits=WhitespaceSplit()), id="other rule of splitting"),
        pytest.param(tokenizer(eos_token="w1"), id="other special token"),
    ],
)
def test_another_tokenizer_has_another_digest(loaded: LoadedModel, other: PreTrainedTokenizerFast) -> None:
    assert fingerprint(replace(loaded, tokenizer=other)).tokenizer_digest != fingerprint(loaded).tokenizer_digest


def test_padding_is_no_part_of_the_tokenizer_digest(loaded: LoadedModel) -> None:
    before = fingerprint(loaded).tokenizer_digest
    loaded.tokenizer.pad_token = "</s>"
    loaded.tokenizer(["w1", "w1 w2"], padding=True)
    assert fingerprint(loaded).tokenizer_digest == before


def test_the_chat_template_has_a_digest_of_its_own(loaded: LoadedModel) -> None:
    before = fingerprint(loaded)
    loaded.tokenizer.chat_template = "{{ messages }}"
    one = fingerprint(loaded)
    loaded.tokenizer.chat_template = "{{ messages }} "
    two = fingerprint(loaded)
    assert len({before.chat_template_digest, one.chat_template_digest, two.chat_template_digest}) == 3
    assert before.tokenizer_digest == one.tokenizer_digest == two.tokenizer_digest


def test_the_same_model_under_another_name_matches(loaded: LoadedModel) -> None:
    check_match(fingerprint(loaded), fingerprint(replace(loaded, source="/srv/models/tiny")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("architecture", "MistralForCausalLM"),
        ("layers", 3),
        ("width", 64),
        ("weight_digest", "aa"),
        ("tokenizer_digest", "bb"),
        ("chat_template_digest", "cc"),
    ],
)
def test_a_mismatch_quotes_both_values_and_the_next_step(loaded: LoadedModel, field: str, value: str | int) -> None:
    expected = fingerprint(loaded)
    found = expected.model_copy(update={field: value, "base_model": "org/other"})
    with pytest.raises(MismatchError) as caught:
        check_match(expected, found)
    message = str(caught.value)
    assert f"{field} is {value!r}, expected {getattr(expected, field)!r}" in message
    assert "made for org/tiny, not for org/other" in message
    assert message.endswith("train or calibrate a guard for this model")
    assert message.count("expected") == 1


def test_every_field_that_differs_is_quoted(loaded: LoadedModel) -> None:
    expected = fingerprint(loaded)
    with pytest.raises(MismatchError, match=r"layers is 3, expected 2; width is 8, expected 32"):
        check_match(expected, expected.model_copy(update={"layers": 3, "width": 8}))


def test_plain_serving(loaded: LoadedModel) -> None:
    assert serving_config(loaded.model) == ServingConfig(dtype="float32", quantization=None, adapters=())
    assert serving_config(loaded.model.to(torch.bfloat16)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "fp8"}, "fp8"),
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes-8bit"),
        (BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes-4bit"),
    ],
)
def test_quantisation_is_named_with_its_bits(loaded: LoadedModel, config: Any, name: str) -> None:
    loaded.model.config.quantization_config = config
    assert serving_config(loaded.model).quantization == name


@pytest.mark.parametrize("active", [["tone", "safety"], lambda: ["tone", "safety"]])
def test_active_adapters_are_named(loaded: LoadedModel, active: Any) -> None:
    wrapped = SimpleNamespace(
        dtype=torch.float32, config=loaded.model.config, peft_config={"tone": 1, "safety": 2}, active_adapters=active
    )
    assert serving_config(wrapped).adapters == ("tone", "safety")
