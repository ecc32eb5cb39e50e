"""What a guard belongs to: a model, its tokenizer and chat template, and the way they are served."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from spider_sense.errors import MismatchError
from spider_sense.sites import layer_count, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spider_sense.models import LoadedModel

__all__ = [
    "Fingerprint",
    "ServingConfig",
    "chat_template_digest",
    "check_match",
    "digest_weights",
    "fingerprint",
    "serving_config",
    "tokenizer_digest",
]

_SAMPLES = 4096
# Digests what a tokenizer does, not how it is serialised: the file's format changes between releases.
_PROBE_TEXT = (
    "Hello world! It's 3.14,  über-naïve\n\n\tdef f(x):\r\n    return x**2  # 東京 привет 🕷️ ﬁ Å <|im_end|></s>"
)


class Fingerprint(BaseModel):
    """Which model, tokenizer and chat template something was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    architecture: str
    """Name of the model's class."""
    base_model: str
    """Name the model was loaded by; for the reader, never compared."""
    layers: int
    width: int
    weight_digest: str
    """sha256 over the name, shape and at most 4096 evenly strided elements, rounded to bf16, of every parameter and
    persistent buffer. Tells another model, a fine-tune, a merge, a quantised copy and a loaded adapter apart. Does not
    tell an edit of a few elements apart: signing the weights does that. Loading in fp32 or bf16 does not change it;
    loading in fp16 may, since fp16 loses small weights."""
    tokenizer_digest: str
    """sha256 over the vocabulary, the special tokens other than padding, and the ids of a fixed text."""
    chat_template_digest: str | None
    """sha256 of the chat template, None if there is none."""


class ServingConfig(BaseModel):
    """How a model is run, as far as it moves the activations and with them the thresholds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    quantization: str | None
    """Method and bits, such as ``bitsandbytes-4bit``; None for plain weights."""
    adapters: tuple[str, ...]
    """Names of the active PEFT adapters."""
    kv_cache: str | None = None
    """Type of the KV cache that vLLM is told, such as ``fp8``; None where it is the model's own."""

    @model_serializer(mode="wrap")
    def _without_default(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A guard that was made before there was the field keeps its digest.
        return {name: value for name, value in write(self).items() if name != "kv_cache" or value is not None}


def fingerprint(loaded: "LoadedModel") -> Fingerprint:
    """Take the fingerprint of a loaded model; well under a second for 135M parameters.

    Raises:
        SiteError: if the architecture is not supported.
    """
    model = loaded.model
    return Fingerprint(
        model_type=model.config.model_type,
        architecture=type(unwrap(model)).__name__,
        base_model=loaded.source,
        layers=layer_count(model),
        width=model.config.get_text_config().hidden_size,
        weight_digest=_weight_digest(model),
        tokenizer_digest=tokenizer_digest(loaded.tokenizer),
        chat_template_digest=chat_template_digest(loaded.tokenizer),
    )


def serving_config(model: "PreTrainedModel") -> ServingConfig:
    """Say how the model is run: dtype, quantisation and active adapters."""
    return ServingConfig(
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=_quantization(getattr(model.config, "quantization_config", None)),
        adapters=_adapters(model),
    )


def check_match(
    expected: Fingerprint, found: Fingerprint, advice: str = "train or calibrate a guard for this model"
) -> None:
    """Check that two fingerprints are of the same model, whatever name it was loaded by.

    Args:
        expected: what something was made for.
        found: the model at hand.
        advice: what to do if they differ.

    Raises:
        MismatchError: quoting every field that differs, with both values.
    """
    differences = [
        f"{field} is {getattr(found, field)!r}, expected {getattr(expected, field)!r}"
        for field in Fingerprint.model_fields
        if field != "base_model" and getattr(found, field) != getattr(expected, field)
    ]
    if differences:
        raise MismatchError(
            f"made for {expected.base_model}, not for {found.base_model}: {'; '.join(differences)}; {advice}"
        )


def _weight_digest(model: nn.Module) -> str:
    # state_dict has the persistent buffers, and lists tied weights under each of their names, so that a copy whose
    # ties were broken on saving has the same entries.
    tensors = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    # A quantised layer may also keep records that are no tensors.
    return digest_weights((name, tensors[name]) for name in sorted(tensors) if isinstance(tensors[name], Tensor))


def digest_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the weight digest of a fingerprint.

    Args:
        tensors: parameters and persistent buffers with their names, in the order of the names.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, -(-flat.numel() // _SAMPLES))]
    if picked.is_floating_point():
        # fp32 weights loaded as bf16 are rounded on loading; rounded here too, both digests are equal.
        picked = picked.to(torch.bfloat16)
    return picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer digest of a fingerprint."""
    # The pad token is left out: it is often set after loading and never scored.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    behaviour = {"vocab": tokenizer.get_vocab(), "special": special, "ids": tokenizer(_PROBE_TEXT)["input_ids"]}
    return _sha256(json.dumps(behaviour, sort_keys=True))


def chat_template_digest(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the chat template digest of a fingerprint."""
    template = tokenizer.chat_template
    return None if template is None else _sha256(json.dumps(template, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _quantization(config: Any) -> str | None:
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    # The method is an enumeration when the config is an object, whose str() differs between Python versions.
    method = getattr(fields["quant_method"], "value", fields["quant_method"])
    bits = next((n for n in (4, 8) if fields.get(f"load_in_{n}bit")), fields.get("bits"))
    return f"{method}-{bits}bit" if bits else str(method)


def _adapters(model: Any) -> tuple[str, ...]:
    if not getattr(model, "peft_config", None):
        return ()
    # A method on transformers models, a property on PEFT's own.
    active = model.active_adapters
    return tuple(active() if callable(active) else active)
