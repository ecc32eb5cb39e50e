"""What ``model.generate`` is called with, read as transformers reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spider_sense.errors import ConfigError
from spider_sense.extraction.observation import Asked
from spider_sense.kv_marks import check_unaltered

__all__ = ["GenerateArguments", "read_arguments"]

_ASSISTED_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_SAMPLING_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_UNSEEN_OPTIONS = ("inputs_embeds", "custom_generate")
_READ_OPTIONS = (
    "num_beams",
    "num_return_sequences",
    "guidance_scale",
    "eos_token_id",
    "pad_token_id",
    "max_new_tokens",
    "sequence_bias",
    "prefill_chunk_size",
    *_SAMPLING_OPTIONS,
    *_ASSISTED_OPTIONS,
)


@dataclass(frozen=True, slots=True, eq=False)
class GenerateArguments:
    """The arguments of one call.

    Shape letters: B prompts, P columns.
    """

    ids_BP: Tensor
    mask_BP: np.ndarray
    """bool, which columns are real tokens."""
    options: Mapping[str, Any]
    """What the call will use of some options, wherever it stands."""
    others: Mapping[str, Any]
    """All arguments but the prompt."""

    @property
    def copies(self) -> int:
        """Answers to each prompt."""
        return self.options["num_return_sequences"] or 1

    @property
    def assisted(self) -> bool:
        """Whether tokens are drafted and verified several at a time."""
        return any(self.options[name] for name in _ASSISTED_OPTIONS)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens at which ``generate`` ends a row."""
        eos = self.options["eos_token_id"]
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    @property
    def asked(self) -> Asked:
        """How the prompts were asked for."""
        bias = self.options["sequence_bias"] or ()
        tokens = {
            token for sequence in (bias if isinstance(bias, dict) else (pair[0] for pair in bias)) for token in sequence
        }
        return Asked(
            parameters={name: self.options[name] for name in _SAMPLING_OPTIONS if self.options[name] is not None},
            biased=tuple(sorted(tokens)),
            max_tokens=self.options["max_new_tokens"] or 0,
        )

    def check_one_pass(self) -> None:
        """Check that one pass will read the whole prompt, so that it can be read again.

        Raises:
            ConfigError: if several will.
        """
        chunk, cache = self.options["prefill_chunk_size"], self.others.get("past_key_values")
        held = 0 if cache is None else int(cache.get_seq_length())
        parts = {f"prefill_chunk_size={chunk}": chunk is not None, f"past_key_values, which holds {held} tokens": held}
        for part, is_set in parts.items():
            if is_set:
                raise ConfigError(
                    f"{part}: patch.begin is 'prompt', and a prompt that is read in parts cannot be read again; leave "
                    "it out, or set patch.begin: token in the policy"
                )


def read_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], default: Any) -> GenerateArguments:
    """Read the arguments of a call.

    Args:
        args: those by position.
        kwargs: those by name.
        default: the model's generation configuration.

    Raises:
        ConfigError: if a guard could not follow what the call does, or the mask does not fit the prompts.
        MismatchError: if its KV cache holds what was computed under a patch.
    """
    ids_BP, others = _prompt_ids(args, kwargs)
    check_unaltered(others.get("past_key_values"))
    options = _options(others, default)
    if (options["num_beams"] or 1) > 1:
        raise ConfigError(f"num_beams={options['num_beams']}: beams are not scored; use num_beams=1")
    if (options["guidance_scale"] or 1) != 1:
        raise ConfigError(
            f"guidance_scale={options['guidance_scale']}: its second pass, over another prompt, would be taken for "
            "the request's own; leave it out of a guarded generate"
        )
    return GenerateArguments(ids_BP, _prompt_mask(ids_BP, others.get("attention_mask"), options), options, others)


def _prompt_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    others = dict(kwargs)
    found = [args[0] if args else None, others.pop("inputs", None), others.pop("input_ids", None)]
    ids = next((value for value in found if value is not None), None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(args) > 1:
        raise ConfigError("a guarded generate needs input_ids as a tensor [batch, tokens], and other arguments by name")
    for name in _UNSEEN_OPTIONS:
        if others.get(name) is not None:
            raise ConfigError(f"{name}: what it makes of the prompt is not scored; leave it out of a guarded generate")
    return ids, others


def _options(kwargs: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the options that ``generate`` will use: its arguments, else the given configuration, else the model's."""
    configs = (kwargs.get("generation_config"), default)
    set_values = {
        name: [value for c in configs if (value := getattr(c, name, None)) is not None] for name in _READ_OPTIONS
    }
    return {name: kwargs[name] if name in kwargs else next(iter(values), None) for name, values in set_values.items()}


def _prompt_mask(ids_BP: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> np.ndarray:
    """Return which prompt columns are real tokens, inferred as transformers does where no mask is given."""
    if mask is None:
        eos, pad = options["eos_token_id"], options["pad_token_id"]
        ends = eos if isinstance(eos, list) else [eos]
        mask = ids_BP != pad if pad is not None and pad not in ends else torch.ones_like(ids_BP)
    if mask.shape != ids_BP.shape:
        raise ConfigError(
            f"attention_mask is {list(mask.shape)}, input_ids are {list(ids_BP.shape)}; with a filled past_key_values, "
            "pass the tokens that it holds as well"
        )
    return mask.cpu().numpy().astype(bool)
