"""Drift: the activations after an untrusted text against those before it, at the same tokens of the template.

TaskTracker (arXiv 2406.00799, section 4) probes the difference of the last token's activations with and without the
untrusted text. In an agent's conversation both are there in one pass: what opens the assistant's turn in which the tool
is called, and what opens its turn after the tool has answered. A linear probe of the difference needs no activation to
be kept, since the logit of a difference is a difference of logits.
"""

from collections.abc import Sequence
from typing import Any

from spider_sense.screening.span import Span

__all__ = ["DRIFT", "Places", "drift", "opening"]

DRIFT = "drift"
"""Name of the probe."""

Places = tuple[slice, slice]
"""The tokens that open the turn before, and those that open the turn after, as many of each."""


def opening(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens with which a chat template opens an assistant's turn; none where it opens it with nothing.

    Nobody can type them: one at least is a control token, or none are returned.
    """
    messages = [{"role": "user", "content": "Alpha one"}]
    closed, opened = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        for prompt in (False, True)
    )
    ids = tuple(tokenizer(opened[len(closed) :], add_special_tokens=False)["input_ids"])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return ids if special.intersection(ids) else ()


def drift(ids: Sequence[int], observation: Span, opens: Sequence[int]) -> Places | None:
    """Return what is compared at an observation; observations with no turn between them share it.

    Args:
        ids: the conversation as the server renders it.
        observation: its span.
        opens: what opens an assistant's turn.

    Returns:
        None if the assistant has had no turn before, or none is opened after it: nothing can be compared.
    """
    if not opens:
        return None
    before = _find(ids, opens, range(observation.start - len(opens), -1, -1))
    after = _find(ids, opens, range(observation.stop, len(ids) - len(opens) + 1))
    return None if before is None or after is None else (before, after)


def _find(ids: Sequence[int], opens: Sequence[int], starts: range) -> slice | None:
    wanted = tuple(opens)
    found = (start for start in starts if ids[start] == wanted[0] and tuple(ids[start : start + len(wanted)]) == wanted)
    start = next(found, None)
    return None if start is None else slice(start, start + len(wanted))
