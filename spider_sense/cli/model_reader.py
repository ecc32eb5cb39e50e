"""Reads the prompts of a log with the model, as a server of it would."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from spider_sense.chat import Chat, Rendered, Turn
from spider_sense.errors import DataError
from spider_sense.extraction.encode import Prompt
from spider_sense.extraction.rows import Row
from spider_sense.extraction.turns import Parts, Turns
from spider_sense.layouts import positions
from spider_sense.models import LoadedModel
from spider_sense.pooling import pooled
from spider_sense.types import Site

__all__ = ["ModelReader", "Progress"]

Progress = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]
"""Given how many prompts there are, a context with a function that is told how many more have been read."""


class ModelReader:
    """Implements ``Read``; see there. A tokenizer without chat template is an error once there is a prompt to read.

    Args:
        loaded: the model and its tokenizer.
        site: where the hidden state is read.
        progress: shows how far reading is.
    """

    def __init__(self, loaded: LoadedModel, site: Site, progress: Progress = lambda total: nullcontext()) -> None:
        self._loaded, self._site, self._progress = loaded, site, progress
        self._rendered: dict[str | tuple[Turn, ...], Rendered] = {}

    def check(self, rows: Sequence[Row]) -> None:
        """Find out whether the model could have been asked what a log says.

        Raises:
            ConfigError: if a row has a prompt and the tokenizer no chat template.
            DataError: if the chat template takes no such conversation as a row's.
        """
        for row in rows:
            if row.prompt is None:
                continue
            try:
                self._render(row.prompt)
            except TemplateError as error:
                roles = ", ".join(message.role for message in row.messages or ()) or "user"
                raise DataError(
                    f"a request of {row.principal!r} has turns of {roles:.80}, which the model's chat template does "
                    f"not take ({error}); write its messages as the server rendered them, a system prompt into the "
                    "user's turn, or name the model that was asked"
                ) from error

    def __call__(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Return mean hidden states, [N, D]; a prompt is cut only where no server could read it."""
        longest = positions(self._loaded.model)
        with self._progress(len(prompts)) as advance:
            rendered = [self._render(prompt) for prompt in prompts]
            return pooled(self._loaded, self._site, rendered, max_tokens=longest, advance=advance)

    def parts(self, prompt: Prompt) -> Parts:
        """Render a prompt and take it apart again."""
        return self._turns.parts(self._render(prompt).ids)

    def _render(self, prompt: Prompt) -> Rendered:
        """Render a prompt, once."""
        name = prompt if isinstance(prompt, str) else tuple(prompt)
        if name not in self._rendered:
            self._rendered[name] = self._chat.render(prompt)
        return self._rendered[name]

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self._loaded.tokenizer)

    @cached_property
    def _turns(self) -> Turns:
        return Turns(self._loaded.tokenizer)
