"""Texts as a stage of a conversation, and the mean activations that they have there.

Shape letters: K texts, D width.
"""

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spider_sense.errors import DataError
from spider_sense.screening.message import Message
from spider_sense.screening.protocols import Sense, SpanReader
from spider_sense.screening.stage import Stage

__all__ = ["pool_texts", "staged"]

_ASKED = "Please look this up for me and tell me what you find."


def staged(text: str, stage: Stage) -> list[Message]:
    """Return the shortest conversation in which a text is of a stage; of an action it is the arguments of a call.

    Raises:
        DataError: if an action's text is no JSON object.
    """
    asked = Message(role="user", content=_ASKED)
    match stage:
        case "query":
            return [Message(role="user", content=text)]
        case "plan":
            return [asked, Message(role="assistant", content=text)]
        case "action":
            return [asked, _call(text)]
    return [asked, _call("{}"), Message(role="tool", tool_call_id="call00000", name="look_up", content=text)]


def _call(arguments: str) -> Message:
    record = {
        "role": "assistant",
        "tool_calls": [{"id": "call00000", "function": {"name": "look_up", "arguments": arguments}}],
    }
    message = Message.parse(record)
    if message.tool_calls[0].arguments is None:
        raise DataError(f"the example of an action {json.dumps(arguments[:60])} is no JSON object; give its arguments")
    return message


def pool_texts(
    reader: SpanReader,
    sense: Sense,
    texts: Sequence[str],
    stage: Stage,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the mean activations [K, D] float32 of texts at the end of a stage.

    Args:
        reader: renders and cuts.
        sense: one that reads a signature site.
        texts: K of them.
        stage: which.
        advance: called with 1 after each text.

    Raises:
        DataError: if a text comes to nothing once it is rendered.
    """
    rows = []
    for number, text in enumerate(texts, start=1):
        conversation = reader.read(staged(text, stage))
        # The tool's answer is the last of its stage, and so is every other text.
        found = zip(conversation.spans, sense.sense(conversation), strict=True)
        pooled = [sensed.pooled_D for span, sensed in found if span.stage == stage]
        if not pooled or pooled[-1] is None or not pooled[-1].any():
            raise DataError(
                f"text {number} of {len(texts)} is empty as {stage}, or too long for the model; leave it out"
            )
        rows.append(pooled[-1])
        if advance is not None:
            advance(1)
    return torch.stack(rows)
