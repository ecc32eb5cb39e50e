"""One random model of two blocks for each architecture in the table of sites, and a tokenizer with a chat template."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES: tuple[str, ...] = (
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)

LAYERS, WIDTH, MLP_WIDTH, VOCAB = 2, 32, 48, 64

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    **_TOKENS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_HEAD = {**_GROUPED, "head_dim": 8}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": _HEAD,
    "gemma3": {"text_config": _HEAD, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 63},
    "gemma3_text": _HEAD,
    "gpt2": {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB, **_TOKENS},
    "gpt_neox": _COMMON,
    "llama": _GROUPED,
    "mistral": _HEAD,
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _HEAD,
    "qwen3_moe": {**_HEAD, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "smollm3": _GROUPED,
}


def tiny_model(name: str, **changes: Any) -> "PreTrainedModel":
    """Build the model: two blocks, width 32, 64 tokens, fp32, eval mode, the same weights every time.

    Args:
        name: the architecture.
        changes: settings of its configuration that are other than usual.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_SETTINGS[name], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


_CONTROL = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "<tool>")
_WORDS = ("system", "user", "assistant", "<|", "im_start", "im_end", "|>", "Alpha", "one", "Zulu", ",", "two")
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system w0<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] + ' ' + m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a tokenizer of 64 words, of which ``w0`` to ``w46`` mean nothing.

    ``<|im_start|>`` and ``<tool>`` are control tokens without a name, as in the tokenizers of many models.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = [*_CONTROL, *_WORDS, *(f"w{n}" for n in range(VOCAB))][:VOCAB]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(list(_CONTROL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=_TEMPLATE,
    )
