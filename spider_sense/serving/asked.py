"""How a request was asked for, as the worker of an engine is told."""

from typing import Any

from spider_sense.extraction.event import CHOICES
from spider_sense.extraction.observation import Asked
from spider_sense.extraction.rules import MANY_LONG
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
"""In the place of -1, by which vLLM is asked for the logits of all tokens."""
_IDS = 2 * MANY_LONG
"""Most tokens that are told of a request: more than any rule asks for, and few enough for a long queue."""


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
    rows = _rows(params)
    return Asked(
        parameters={field: value for field in _PARAMETERS if (value := getattr(params, field, None)) is not None},
        biased=tuple(sorted(_chosen(params, rows))[:_IDS]),
        top_logprobs=_shown(params, rows),
        max_tokens=0 if unset else most,
        choices=min(max(choice.choices, 1) + len(rows), CHOICES),
    )


def _rows(params: Any) -> list[list[int]]:
    """Return the tokens whose logits are asked for by name at each token of the prompt."""
    found = params.prompt_logprob_token_ids
    # -1 fills up a row.
    return [] if found is None else [[int(token) for token in row if token >= 0] for row in found]


def _chosen(params: Any, rows: list[list[int]]) -> set[int]:
    """Return the tokens that a request chose, by a bias or by name, or by allowing them if it is told their logits."""
    allowed = (params.allowed_token_ids or ()) if _is_told(params) else ()
    return {
        *(params.logit_bias or ()),
        *(params.logprob_token_ids or ()),
        *allowed,
        *(one for row in rows for one in row),
    }


def _shown(params: Any, rows: list[list[int]]) -> int:
    """Return how many logits a token of the answer or the prompt shows; that of the sampled token is never left out."""
    best = [params.logprobs or 0, params.prompt_logprobs or 0]
    if min(best) < 0:
        return _ALL
    return max(*best, len(params.logprob_token_ids or ()), *map(len, rows), int(_is_told(params)))


def _is_told(params: Any) -> bool:
    """Return whether log-probabilities of the answer are told, those of the sampled tokens at least."""
    return params.logprobs is not None or bool(params.logprob_token_ids)
