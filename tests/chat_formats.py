"""Tokenizers of bytes with the control tokens and a chat template in the format of four families of models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_CHATML = ("<|im_start|>", "<|im_end|>")
_TOKENS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "smollm2": (_CHATML, ()),
    "qwen2": (_CHATML, ("<tool_call>", "</tool_call>")),
    "llama3": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        (),
    ),
    "mistral": (("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), ()),
}
"""Control tokens, and added tokens that are none."""
_ENDS = {"smollm2": "<|im_end|>", "qwen2": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}
_CALLS = "{% for c in m.tool_calls or [] %}"
_TEMPLATES = {
    "smollm2": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}<tool_call>[" + _CALLS + '{"name": "{{ c.function.name }}", "arguments": '
        "{{ c.function.arguments | tojson }}}{{ ', ' if not loop.last }}{% endfor %}]</tool_call>{% endif %}"
        "<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen2": (
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.previtem is undefined or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
        "\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}{% if m.content %}\n{{ m.content }}{% endif %}"
        + _CALLS
        + '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
        "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "<|begin_of_text|>{% for m in messages %}"
        "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
        "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
        "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] "
        '{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
        "{% elif m.tool_calls %}[TOOL_CALLS] ["
        + _CALLS
        + '{{ c.function | tojson }}{{ ", " if not loop.last }}{% endfor %}]</s>'
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
}
FORMATS = tuple(_TEMPLATES)


def format_tokenizer(name: str, merges: Sequence[tuple[str, str]] = ()) -> "PreTrainedTokenizerFast":
    """Build the tokenizer of a family: a token for each byte and each merge of two tokens, and its control tokens."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(one + other for one, other in merges)]
    backend = Tokenizer(BPE({word: n for n, word in enumerate(words)}, list(merges)))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Decoder()
    control, plain = _TOKENS[name]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=_ENDS[name], pad_token=_ENDS[name], chat_template=_TEMPLATES[name]
    )


def format_model(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """Build a random llama of two blocks and width 32 for a tokenizer, the same every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        initializer_range=0.3,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
