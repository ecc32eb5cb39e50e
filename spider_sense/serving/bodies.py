"""What a client may ask of transformers' server under a guard: one prompt, and nothing that reaches past the guard."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from transformers import PreTrainedTokenizerBase

__all__ = ["check_body", "check_prompt", "check_room"]

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

_RENDERING = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""What says how a prompt is rendered. The guard's thresholds are those of the model's own template, rendered in full;
what a template itself takes, such as ``enable_thinking``, has other names."""


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
    if body.get("n") not in (None, 1):
        raise HTTPException(400, f"n: {body['n']} answers cannot be had at once; ask for one, as often as you need")
    if not body.get("messages", True):
        raise HTTPException(400, "messages is empty; give one at least")
    told = body.get("chat_template_kwargs")
    if told is not None and not isinstance(told, dict):
        raise HTTPException(400, "chat_template_kwargs is not a JSON object")
    beyond = sorted(_RENDERING.intersection(told or ()))
    if beyond:
        raise HTTPException(400, f"chat_template_kwargs: {', '.join(beyond)} cannot be set under a guard; leave it out")


def check_prompt(prompts: Sequence[Any]) -> None:
    """Check that a request is one prompt with something in it; an empty one ends the engine that packs.

    Args:
        prompts: token ids.

    Raises:
        HTTPException: if it is not.
    """
    if len(prompts) != 1 or not prompts[0] or not isinstance(prompts[0][0], int):
        raise HTTPException(400, "a request is one prompt of at least one token")


def check_room(prompt: int, answer: int | None, room: int) -> None:
    """Check that a request fits into the engine that packs, which one that does not fit would end for everybody.

    Args:
        prompt: its tokens.
        answer: most tokens of its answer; None where nothing bounds them.
        room: tokens that the KV cache holds.

    Raises:
        HTTPException: if it does not fit.
    """
    if answer is None:
        raise HTTPException(400, "nothing bounds the answer; name max_tokens")
    if prompt + answer > room:
        raise HTTPException(
            400, f"{prompt} tokens and an answer of {answer} do not fit the {room} of the KV cache; ask for fewer"
        )
