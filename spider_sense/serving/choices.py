"""The verdicts of an answer with several choices: each by its index, and the worst for whoever reads no further.

vLLM runs every choice as a request of its own. Of the ``n`` choices of a prompt an answer carries what the last one to
end said, of several prompts in one request what the first said.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spider_sense.decision import SEVERITY
from spider_sense.serving.settings import KEY
from spider_sense.serving.withheld import withhold_prompt
from spider_sense.types import ZONES

__all__ = ["Said", "collected", "gathered", "verdict_of", "verdicts_of"]

Said = Mapping[str, Any]
"""What an answer says of one choice, as ``Findings.answer`` returns it."""

_SAID = "_spider_sense_said"
_UNKNOWN: Said = {"zone": None, "action": None, "reason": "a choice has no verdict"}


def verdict_of(choices: Sequence[Said | None]) -> dict[str, Any]:
    """Return what is said of several choices together: the worst, and under ``choices`` each of them.

    Args:
        choices: verdicts by index, None for a choice of which nothing is known; nothing is worse than that.
    """
    worst = max(choices, key=_badness)
    return {**(_UNKNOWN if worst is None else worst), "choices": list(choices)}


def _badness(said: Said | None) -> tuple[int, int]:
    if said is None:
        return len(SEVERITY), len(ZONES)
    return SEVERITY.index(said["action"]), ZONES.index(said["zone"])


def verdicts_of(result: Any) -> list[Said | None]:
    """Return the verdict of each choice of a prompt by index, an empty list if nothing is said of any.

    Args:
        result: vLLM's ``RequestOutput``.
    """
    said = (result.kv_transfer_params or {}).get(KEY)
    if said is None:
        return []
    return list(said["choices"]) if "choices" in said else [said]


def collected(
    original: Callable[..., Any],
    state: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """Make the result of a request, with what its siblings said so far where it is one choice of several.

    Args:
        original: makes it, or None while there is nothing to hand out.
        state: vLLM's ``RequestState``.
        args: passed on; the fifth is what the engine says with its tokens.
        options: passed on; an abort gives all by name, and says nothing.
    """
    told = args[4] if len(args) > 4 else options.get("kv_transfer_params")
    said = (told or {}).get(KEY)
    if said is not None and said["action"] == "stop":
        withhold_prompt(state)
    result, parent = original(*args, **options), state.parent_req
    if parent is None:
        return result
    known: dict[int, Said] = getattr(parent, _SAID, {})
    if said is not None:
        known[state.request_index] = said
        setattr(parent, _SAID, known)
    if result is not None and known:
        _say(result, [known.get(index) for index in range(parent.n)])
    return result


def gathered(original: Callable[..., Any], serving: Any, results: Sequence[Any], *args: Any, **options: Any) -> Any:
    """Make the answer of a request with several prompts, with the verdicts of all in the order of its choices.

    Args:
        original: makes it out of results.
        serving: what ``original`` belongs to.
        results: one of each prompt.
        args: passed on.
        options: passed on.
    """
    answer = original(results, *args, **options)
    choices = [one for result in results for one in verdicts_of(result) or [None] * len(result.outputs)]
    if len(results) > 1 and any(choices):
        _say(answer, choices)
    return answer


def _say(what: Any, choices: Sequence[Said | None]) -> None:
    what.kv_transfer_params = {**(what.kv_transfer_params or {}), KEY: verdict_of(choices)}
