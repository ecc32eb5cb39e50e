"""Reads the prompts of a log with the model, as a server of it would."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from spider_sense.chat import Chat
from spider_sense.extraction.encode import Prompt
from spider_sense.extraction.turns import Parts, Turns
from spider_sense.models import LoadedModel
from spider_sense.pooling import pooled
from spider_sense.types import Site

__all__ = ["ModelReader", "Progress"]

Progress = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]
"""Given how many prompts there are, a context with a function that is told how many more have been read."""


class ModelReader:
    """Implements ``Read``; see there.

    Args:
        loaded: the model and its tokenizer.
        site: where the hidden state is read.
        progress: shows how far reading is.

    Raises:
        ConfigError: if the tokenizer has no chat template.
    """

    def __init__(self, loaded: LoadedModel, site: Site, progress: Progress = lambda total: nullcontext()) -> None:
        self._loaded, self._site, self._progress = loaded, site, progress
        self._chat, self._turns = Chat(loaded.tokenizer), Turns(loaded.tokenizer)

    def __call__(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Return mean hidden states, [N, D]; a prompt is cut only where no server could read it."""
        longest = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        with self._progress(len(prompts)) as advance:
            return pooled(self._loaded, self._site, prompts, max_tokens=longest, advance=advance)

    def parts(self, prompt: Prompt) -> Parts:
        """Render a prompt and take it apart again."""
        return self._turns.parts(self._chat.render(prompt).ids)
