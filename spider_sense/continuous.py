"""Requests of transformers' continuous batching (``model.generate_batch``, ``transformers serve``) before the judge.

A stopped request ends with the token of the step that found it; the engine offers no way to append a refusal.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spider_sense.forward import SequenceRows
from spider_sense.judge import Case, Judge
from spider_sense.scoring import RequestRows

__all__ = ["ContinuousCalls"]


class ContinuousCalls:
    """Judges packed batches.

    A request whose prompt begins with blocks that another request filled arrives with these tokens missing: unless the
    engine runs with ``allow_block_sharing=False``, the policy's ``on_missing`` decides about it.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.cases: dict[str, Case] = {}
        """All requests seen, by the engine's id."""
        self._running: dict[str, Any] = {}

    def scored(self, logits_TC: Tensor, sequences: Sequence[SequenceRows]) -> None:
        """Take the logits of a step, and end the requests that the policy stops."""
        self._sweep()
        for item in sequences:
            name = str(item.key)
            if name not in self.cases and item.prompt is not None:
                self.cases[name] = self._judge.open(name, item.prompt)
                self._running[name] = item.handle
        self._judge.step(
            logits_TC, [RequestRows(self.cases[str(item.key)].request, item.rows, item.positions) for item in sequences]
        )
        for case in self._judge.decide(self._judge.read([self.cases[str(item.key)] for item in sequences])):
            if case.decision.action == "stop":
                state = self._running[case.request.id]
                # The engine compares this with the tokens so far when it takes in the step's token.
                state._new_tokens_limit = state.generated_len() + 1

    def close(self) -> None:
        """Close every request."""
        for name in list(self._running):
            self._close(name)

    def _sweep(self) -> None:
        from transformers.generation.continuous_batching.requests import RequestStatus

        for name, state in list(self._running.items()):
            if state.status in (RequestStatus.FINISHED, RequestStatus.FAILED):
                self._close(name)

    def _close(self, name: str) -> None:
        del self._running[name]
        self._judge.close(self.cases[name])
