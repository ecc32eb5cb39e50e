"""The fingerprint of files is that of the model that transformers makes of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spider_sense.errors import MismatchError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel
from spider_sense.serving.checkpoint import checkpoint_fingerprint


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "phi3", "smollm3"])
def test_it_is_the_models(
    kind: str, tiny_model: Callable[[str], PreTrainedModel], tiny_loaded: LoadedModel, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "llama" else "5GB")
    loaded = LoadedModel(
        model=type(model).from_pretrained(tmp_path), tokenizer=tiny_loaded.tokenizer, source=str(tmp_path)
    )
    assert checkpoint_fingerprint(tmp_path, tiny_loaded.tokenizer) == fingerprint(loaded)


def test_other_weights_have_another_one(tiny_loaded: LoadedModel, tmp_path: Path) -> None:
    tiny_loaded.model.save_pretrained(tmp_path)
    before = checkpoint_fingerprint(tmp_path, tiny_loaded.tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    after = checkpoint_fingerprint(tmp_path, tiny_loaded.tokenizer)
    assert after.weight_digest != before.weight_digest
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        checkpoint_fingerprint(tmp_path, tiny_loaded.tokenizer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match="holds neither"):
        checkpoint_fingerprint(tmp_path, tiny_loaded.tokenizer)
