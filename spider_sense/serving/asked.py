"""How a request was asked for, as the worker of an engine is told."""

from collections.abc import Callable
from typing import Any

from spider_sense.extraction.event import CHOICES
from spider_sense.extraction.observation import Asked
from spider_sense.serving.canary import REQUEST

__all__ = ["asked_of", "numbered"]

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
_CHOICES = "spider_sense_choices"
"""Key in ``SamplingParams.extra_args``. A client that fills it itself counts for more, and never for less."""


def numbered(original: Callable[..., Any], parent: Any, index: int) -> Any:
    """Make the request of one choice of several, and write into its sampling parameters how many there are."""
    name, params = original(index)
    params.extra_args = {**(params.extra_args or {}), _CHOICES: parent.n}
    return name, params


def asked_of(new: Any, longest: int) -> Asked | None:
    """Return how a request was asked for, None of one that is nobody's question.

    Args:
        new: vLLM's ``NewRequestData``.
        longest: tokens that a request may have in all; what vLLM sets as the maximum where the client sets none.
    """
    name, params = str(new.req_id), new.sampling_params
    choice, _, _ = name.partition("_")
    # vLLM runs each choice as a request, and calls it by its index: they are one question.
    if name.startswith(REQUEST) or params is None or (choice.isdigit() and choice != "0"):
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
        choices=_choices(params),
    )


def _choices(params: Any) -> int:
    found = (params.extra_args or {}).get(_CHOICES)
    return min(max(found, 1), CHOICES) if isinstance(found, int) else 1
