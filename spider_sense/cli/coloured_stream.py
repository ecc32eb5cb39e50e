"""A streamer that colours each token by its running score."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers.generation.streamers import BaseStreamer

from spider_sense.case import Case
from spider_sense.cli.plain import plain

__all__ = ["ColouredStream"]


class ColouredStream(BaseStreamer):  # type: ignore[misc]
    """Prints each generated token once its score is known: green, yellow from suspect on, red from breach on.

    Args:
        tokenizer: decodes the tokens.
        prompt: tokens of the prompt, which are not printed.
        out: where to print.
    """

    def __init__(self, tokenizer: Any, prompt: int, out: Console) -> None:
        self._tokenizer, self._out = tokenizer, out
        self._skip, self._ids, self._printed = prompt, list[int](), 0

    def put(self, value: Any) -> None:
        """Take the prompt, then one token at a time."""
        self._ids += value.flatten().tolist()

    def end(self) -> None:
        """Print what has no score of its own: a refusal, and the last token, which never passes through the model."""
        self._print(len(self._ids) - self._skip, "dim")
        self._out.print()

    def step(self, cases: Sequence[Case]) -> None:
        """Print the tokens up to the position that the reading includes."""
        for case in cases:
            readout = case.history[-1][1] if case.history else 0.0
            self._print(case.position + 1 - self._skip, colour(readout, *case.thresholds[:, 0].tolist()))

    def _print(self, upto: int, style: str) -> None:
        tokens = self._ids[self._skip + self._printed : self._skip + upto]
        if tokens:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            self._out.print(plain(text, style), end="", soft_wrap=True)
            self._printed += len(tokens)


def colour(readout: float, suspect: float, breach: float) -> str:
    """Return a rich style for a running score: green below, yellow from the suspect threshold, bold red from breach."""
    if not readout < breach:
        return "bold red"
    return "yellow" if not readout < suspect else "green"
