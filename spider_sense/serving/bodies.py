"""What a client may ask of transformers' server under a guard: one prompt, and nothing that reaches past the guard."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException

__all__ = ["check_body", "check_prompt"]

_HARMLESS = {
    "bos_token_id",
    "do_sample",
    "epsilon_cutoff",
    "eos_token_id",
    "eta_cutoff",
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "pad_token_id",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
}
"""Fields of a client's ``generation_config`` that choose among tokens or end an answer. The others reach further: into
drafts, caches, the number of answers and the order in which logits are changed."""


def check_body(body: Mapping[str, Any]) -> None:
    """Check that nothing in the body of a request would reach the engine past the guard.

    Raises:
        HTTPException: naming what does.
    """
    try:
        config = json.loads(body.get("generation_config") or "{}")
    except (TypeError, ValueError) as error:
        raise HTTPException(400, f"generation_config is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise HTTPException(400, "generation_config is not a JSON object")
    far = sorted(name for name, value in config.items() if name not in _HARMLESS and value is not None)
    if far:
        raise HTTPException(400, f"generation_config: {', '.join(far)} cannot be set under a guard; leave it out")
    if "chat_template" in (body.get("chat_template_kwargs") or ()):
        raise HTTPException(400, "chat_template cannot be set: the guard's thresholds are those of the model's own")


def check_prompt(prompts: Sequence[Any]) -> None:
    """Check that a request is one prompt with something in it; an empty one ends the engine that packs.

    Args:
        prompts: token ids.

    Raises:
        HTTPException: if it is not.
    """
    if len(prompts) != 1 or not prompts[0] or not isinstance(prompts[0][0], int):
        raise HTTPException(400, "a request is one prompt of at least one token")
