"""The fingerprint of a model that an engine loads in its own layout, taken from the checkpoint on disk.

vLLM merges projections and shards them, so its parameters have no counterparts in transformers. The files do.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from spider_sense.errors import MismatchError
from spider_sense.fingerprint import Fingerprint, chat_template_digest, digest_weights, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["checkpoint_fingerprint"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def checkpoint_fingerprint(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> Fingerprint:
    """Take the fingerprint that the model in a folder has once transformers has loaded it.

    Args:
        folder: a checkpoint as ``save_pretrained`` writes it.
        tokenizer: the server's.

    Raises:
        MismatchError: if the folder holds no safetensors, or not the tensors that transformers names.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    files = _files(folder)
    tied = getattr(empty, "all_tied_weights_keys", {})
    names = {name: tied.get(name, name) for name in empty.state_dict()}
    unknown = sorted(source for source in names.values() if source not in files)
    if unknown:
        raise MismatchError(
            f"{folder} has no tensor {unknown[0]} that {type(empty).__name__} has, so it cannot be told whether the "
            "guard was made for it; save the model with transformers' save_pretrained and serve that"
        )
    text = config.get_text_config()
    return Fingerprint(
        model_type=config.model_type,
        architecture=type(empty).__name__,
        base_model=str(folder),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        weight_digest=digest_weights(_tensors(names, files)),
        tokenizer_digest=tokenizer_digest(tokenizer),
        chat_template_digest=chat_template_digest(tokenizer),
    )


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    if (folder / INDEX).is_file():
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return {name: folder / file for name, file in index["weight_map"].items()}
    if not (folder / SINGLE).is_file():
        raise MismatchError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; serve a folder that transformers' save_pretrained wrote"
        )
    with safe_open(folder / SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _tensors(names: dict[str, str], files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under the name that transformers gives it, one in memory at a time."""
    for name, source in sorted(names.items()):
        with safe_open(files[source], "pt") as file:
            yield name, file.get_tensor(source)
