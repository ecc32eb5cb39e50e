"""Where a request comes from: who sends it, which of several choices it is, and whether it is the guard's own.

It reaches the engine in the request's sampling parameters (``extra_args``), which clients can fill too
(``vllm_xargs``); the names of requests are no help, since clients choose those of ``/v1/responses``. So the front end
takes out what a client wrote there. A choice is marked before that, and known from a client's by its class, which no
JSON has.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

__all__ = ["CANARY", "Choice", "choice_of", "is_canary", "name_principal", "numbered", "principal_of"]

_PRINCIPAL, _CHOICE, _CANARY = "spider_sense_principal", "spider_sense_choice", "spider_sense_canary"
CANARY = {_CANARY: True}
"""``extra_args`` of a canary, which the engine sends itself."""


class Choice(NamedTuple):
    """One of the answers to a prompt, each of which vLLM runs as a request of its own."""

    place: int
    """Of the answers, from 0."""
    choices: int
    """How many were asked for."""


def numbered(original: Callable[..., Any], parent: Any, index: int) -> Any:
    """Make the request of one choice of several, and write into its sampling parameters which it is."""
    name, params = original(index)
    # Without a seed vLLM hands the same parameters to all.
    params = copy(params)
    params.extra_args = {**(params.extra_args or {}), _CHOICE: Choice(index, parent.n)}
    return name, params


def name_principal(params: Any, principal: str | None) -> None:
    """Write a principal, or nobody, into the sampling parameters of a request, over all that its client wrote there."""
    others = {key: value for key, value in (params.extra_args or {}).items() if not _forged(key, value)}
    named = {} if principal is None else {_PRINCIPAL: principal}
    params.extra_args = {**others, **named} or None


def principal_of(params: Any) -> str | None:
    """Return the principal that the front end has written into sampling parameters."""
    found = _argument(params, _PRINCIPAL)
    return found if isinstance(found, str) else None


def choice_of(params: Any) -> Choice:
    """Return which choice the request of some sampling parameters is; where nothing is said, the only one."""
    match _argument(params, _CHOICE):
        case [int(place), int(choices)]:
            return Choice(place, choices)
    return Choice(0, 1)


def is_canary(params: Any) -> bool:
    """Return whether sampling parameters are those of a canary."""
    return _argument(params, _CANARY) is True


def _forged(key: str, value: Any) -> bool:
    return key in (_PRINCIPAL, _CANARY) or (key == _CHOICE and not isinstance(value, Choice))


def _argument(params: Any, key: str) -> Any:
    return None if params is None else (params.extra_args or {}).get(key)
