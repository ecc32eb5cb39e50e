"""Aggregators: how the token logits of a probe become one running value.

``Aggregator`` is what the guard's manifest stores; ``lanes`` turns it into the streaming recurrences of
``sense_kernels``. The formulas stand in ``sense_kernels.recurrences``.
"""

import math
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import FiniteFloat, model_validator

from sense_kernels import PROMPT, RESPONSE, TAIL, Lane
from spider_sense.config import Settings

__all__ = ["SPAN_BITS", "Aggregator", "AggregatorKind", "Span"]

AggregatorKind = Literal[
    "mean",
    "max",
    "ema_max",
    "softmax",
    "attention",
    "multimax",
    "cusum",
    "rolling_mean_max",
    "rolling_attention",
]

Span = Literal["all", "prompt", "tail", "response"]
"""Which tokens a head folds: all; the prompt; the last prompt tokens, which the chat template adds after the user's
turn; the response."""

SPAN_BITS: dict[Span, int] = {"all": PROMPT | RESPONSE, "prompt": PROMPT, "tail": TAIL, "response": RESPONSE}

_QUERIES = ("attention", "rolling_attention")


class Aggregator(Settings):
    """One head's aggregator."""

    kind: AggregatorKind
    span: Span = "all"
    """Tokens that are folded."""
    parts: int = 1
    """Values per token, summed after aggregation: (query, value) pairs for the attention kinds, values for multimax."""
    alpha: FiniteFloat = 0.1
    """ema_max: weight of the newest token, in (0, 1]; the first 1 / alpha tokens are averaged evenly."""
    temperature: FiniteFloat = 5.0
    """softmax: the logit is divided by it to give the weight's exponent."""
    kappa: FiniteFloat = 0.0
    """cusum: drift taken off every token."""
    window: int = 0
    """Rolling kinds: tokens in the window."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.parts < 1 or (self.parts > 1 and self.kind not in (*_QUERIES, "multimax")):
            raise ValueError(f"{self.kind} cannot have {self.parts} parts")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.kind.startswith("rolling") != (self.window > 0):
            raise ValueError(f"window must be {'positive' if self.kind.startswith('rolling') else '0'} for {self.kind}")
        return self

    @property
    def columns(self) -> int:
        """Logit columns that the head reads: queries first, then values."""
        return self.parts * (2 if self.kind in _QUERIES else 1)

    def lanes(self, head: int, column: int) -> Iterator[Lane]:
        """Yield the head's lanes.

        Args:
            head: index of the head in its bank.
            column: its first logit column.
        """
        span = SPAN_BITS[self.span]
        for part in range(self.parts):
            query, value = column + part, column + self.columns - self.parts + part
            if self.kind == "softmax":
                yield Lane(kind="attention", head=head, value=value, query=value, span=span, param=1 / self.temperature)
            elif self.kind in ("attention", "rolling_attention"):
                yield Lane(kind=self.kind, head=head, value=value, query=query, span=span, window=self.window)
            elif self.kind == "multimax":
                yield Lane(kind="max", head=head, value=value, span=span)
            else:
                param = {"ema_max": self.alpha, "cusum": self.kappa}.get(self.kind, 1.0)
                window = math.ceil(1 / self.alpha) if self.kind == "ema_max" else self.window
                yield Lane(kind=self.kind, head=head, value=value, span=span, param=param, window=window)
