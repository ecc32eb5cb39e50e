"""The mean hidden state of a prompt at one site, read by the bank and the fold that score live requests.

Shape letters: N prompts, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.chat import Turn
from spider_sense.data import Example
from spider_sense.extraction.sketch import mean_heads
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples
from spider_sense.types import Site

__all__ = ["Pooled", "pooled"]


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """What a sketch is made of."""

    hidden_ND: NDArray[np.float32]
    """Mean over the prompt's tokens of ``h / rms(h)``."""
    tokens: NDArray[np.int64]
    """Prompt tokens, [N]."""


def pooled(
    loaded: LoadedModel,
    site: Site,
    prompts: Sequence[str | Sequence[Turn]],
    *,
    max_tokens: int = 512,
    batch_tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> Pooled:
    """Run the model over prompts and return their mean hidden states: the readouts of D heads, one a coordinate.

    Args:
        loaded: the model and its tokenizer.
        site: where to read.
        prompts: texts of a single user turn, or conversations.
        max_tokens: longer prompts are cut in the middle.
        batch_tokens: padded tokens of a forward pass.
        advance: called with the number of prompts that have just been read.
    """
    width = int(loaded.model.config.get_text_config().hidden_size)
    names = [f"coordinate.{index}" for index in range(width)]
    heads = mean_heads(site, np.eye(width, dtype=np.float32), np.zeros(width, dtype=np.float32), names)
    examples = [_example(index, prompt) for index, prompt in enumerate(prompts)]
    result = score_examples(loaded, heads, examples, max_tokens=max_tokens, batch_tokens=batch_tokens, advance=advance)
    return Pooled(result.prompt_NH.astype(np.float32), result.tokens)


def _example(index: int, prompt: str | Sequence[Turn]) -> Example:
    turns = None if isinstance(prompt, str) else tuple(prompt)
    text = prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt)
    return Example(id=str(index), text=text, label="", category="", source="", group="", turns=turns)
