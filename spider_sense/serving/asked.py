"""How a request was asked for, as the worker of an engine is told."""

from typing import Any

from spider_sense.extraction.event import CHOICES
from spider_sense.extraction.observation import Asked
from spider_sense.serving.origin import choice_of, is_canary

__all__ = ["asked_of"]

_PARAMETERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)
"""Those that tell one client program from another. A seed, which vLLM changes for each choice, does not."""
_ALL = 2**31 - 1


def asked_of(new: Any, longest: int) -> Asked | None:
    """Return how a request was asked for, None of one that is nobody's question or has been told already.

    Args:
        new: vLLM's ``NewRequestData``.
        longest: tokens that a request may have in all; what vLLM sets as the maximum where the client sets none.
    """
    params, choice = new.sampling_params, choice_of(new.sampling_params)
    # The choices of an answer are one question.
    if params is None or is_canary(params) or choice.place:
        return None
    most = params.max_tokens or 0
    unset = most + len(new.prompt_token_ids or ()) >= longest
    # vLLM tells logits of tokens that are named, and of tokens that are biased into the answer; -1 tells all of them.
    named, best = params.logprob_token_ids or (), params.logprobs or 0
    return Asked(
        parameters={field: value for field in _PARAMETERS if (value := getattr(params, field, None)) is not None},
        biased=tuple(sorted({*(params.logit_bias or ()), *named})),
        top_logprobs=max(best, len(named)) if best >= 0 else _ALL,
        max_tokens=0 if unset else most,
        choices=min(max(choice.choices, 1), CHOICES),
    )
