"""One guarded call of ``model.generate``: names the rows of each forward pass, and carries out what the judge decides.

Rows of the batch that are stopped are made to emit the refusal text and then the end token, through the logits; the
other rows are not touched.

Where the policy lets a patch begin with the prompt, the verdict on the prompt is awaited. If some row is to be patched,
the pass is run once more, under the patch: the KV that it has filled is dropped, and nothing is scored twice.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spider_sense.case import Case
from spider_sense.errors import SpiderSenseError
from spider_sense.forward import Forward, SequenceRows, padded_rows
from spider_sense.judge import Judge, Reading
from spider_sense.kv_cache import cached_columns, empty
from spider_sense.scoring import RequestRows

__all__ = ["GuardedCall"]


class GuardedCall:
    """State of one ``generate`` call.

    Args:
        judge: scores and decides.
        cases: one per row of the batch.
        mask_BP: bool, which columns of the prompt are real tokens.
        eos_ids: tokens after which ``generate`` ends a row; a token that merely looks like one must not be among them,
            for what follows is not scored.
        refusal: token ids that a stopped row ends with.
        line_break: token ids that set the refusal apart from an answer that has begun.
        end_id: emitted after the refusal.
        act: called with the cases that are patched or steered by their batch rows, whenever they change.
        on_step: called with the running cases after each step that was judged.
        assisted: whether tokens are drafted and verified several at a time.
    """

    def __init__(
        self,
        judge: Judge,
        cases: Sequence[Case],
        mask_BP: np.ndarray,
        eos_ids: Sequence[int],
        refusal: Sequence[int],
        line_break: Sequence[int],
        end_id: int,
        act: Callable[[dict[Hashable, Case]], None],
        on_step: Callable[[Sequence[Case]], None] | None = None,
        assisted: bool = False,
    ) -> None:
        self.cases = list(cases)
        self._open = list(cases)
        self._judge, self._act, self._on_step = judge, act, on_step
        self._mask_BP, self._eos_ids = mask_BP, tuple(eos_ids)
        self._refusal, self._line_break, self._end_id = tuple(refusal), tuple(line_break), end_id
        self._alive = [True] * len(cases)
        self._assisted = assisted
        self._lengths_B = mask_BP.sum(1)
        self._past = 0
        self._forward: Forward | None = None
        self._draft: Tensor | None = None
        self.cache: Any = None
        """The KV cache of the last pass, if it had one."""
        self.stopped_at: dict[int, int] = {}
        """Column at which the refusal of a stopped row begins."""
        self._reading: Reading | None = None
        self._judged = True
        self._reads_prompt = self._again = False
        # What could not be recorded gets no token.
        self._end_stopped(mask_BP.shape[1])

    def name_rows(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Forward:
        """Name the rows of the next forward pass, and commit the drafts that it shows to be accepted."""
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        tokens, prompt = input_ids.shape[1], self._mask_BP.shape[1]
        if len(input_ids) != len(self.cases):
            raise SpiderSenseError(
                f"a pass has {len(input_ids)} rows for {len(self.cases)} requests, so they cannot be told apart; "
                "generate without the option that multiplies rows"
            )
        self.cache = kwargs.get("past_key_values")
        past = 0 if self._again else cached_columns(self.cache, self._past)
        if self._past and past not in (0, self._past) and not self._assisted:
            raise SpiderSenseError(
                f"a pass continues from column {past}, but the last one ended at {self._past}: it is not this request's"
            )
        self._commit_draft(past)
        # Without a cache a pass repeats all columns; of drafted tokens only the first is certain.
        newest = 0 if self._assisted else tokens - 1
        if past + newest >= prompt:
            self._retire_ended(input_ids[:, newest].tolist())
        columns = past + tokens
        self._reads_prompt = self._past == past == 0 and columns >= prompt
        if tokens == 1 and past >= prompt:
            return self._next(past)
        ones = np.ones((len(self.cases), max(0, columns - prompt)), dtype=bool)
        mask_BK = np.concatenate((self._mask_BP, ones), 1)[:, :columns]
        sequences = tuple(rows for rows in padded_rows(mask_BK, past, tokens) if self._alive[_row(rows)])
        self._past, self._judged = columns, self._again
        self._forward = Forward(len(self.cases) * tokens, sequences, tokens, past)
        return self._forward

    def _next(self, past: int) -> Forward:
        """Name the rows of a decode step: one for each request that goes on."""
        live = [row for row, alive in enumerate(self._alive) if alive]
        positions = self._lengths_B + past - self._mask_BP.shape[1]
        sequences = tuple(SequenceRows(row, np.array([row]), positions[row : row + 1]) for row in live)
        self._past, self._judged = past + 1, False
        self._forward = Forward(len(self.cases), sequences, 1, past)
        return self._forward

    def scored(self, logits_TC: Tensor) -> bool:
        """Take the logits of the pass that has just ended; drafts wait until it is known which are accepted.

        Returns:
            Whether the pass is to be run again, because it read a prompt that is to be read under the patch.
        """
        assert self._forward is not None
        prompt = self._mask_BP.shape[1]
        drafted = self._assisted and self._forward.tokens > 1 and self._past > prompt
        # The first token of a later pass was chosen before any draft.
        ready = self._before(max(prompt, self._forward.past + 1)) if drafted else self._forward.sequences
        self._fold(logits_TC, ready)
        self._draft = logits_TC.clone() if drafted else None
        self._again = self._reads_prompt and self._judge.policy.reads_again and self._judge_prompt()
        return self._again

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Force the refusal of stopped rows; transformers calls this logits processor before it picks each token.

        Args:
            input_ids: [B, K] tokens so far.
            scores: [B, V] next-token scores.
        """
        column = input_ids.shape[1]
        if self._past < column and not self._assisted:
            raise SpiderSenseError(
                f"the guard saw {self._past} of {column} columns: its hooks did not run. Attach the monitor after "
                "the model was compiled, and call generate on the model that it is attached to"
            )
        # A drafting engine asks several times a pass, and about columns that no pass has reached yet.
        if not self._judged and column <= self._past:
            self._judge_step(column)
        for row, start in self.stopped_at.items():
            offset = column - start
            if offset >= 0:
                begun = start > self._mask_BP.shape[1]
                ending = (*self._line_break, *self._refusal) if begun else self._refusal
                token = ending[offset] if offset < len(ending) else self._end_id
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

    def finish(self, columns: int) -> None:
        """Fold what is left and close the cases.

        Args:
            columns: length of the output, prompt included.
        """
        self._commit_draft(columns - 1)
        if self._past < columns - 1:
            raise SpiderSenseError(f"the guard saw {self._past} of {columns} columns: its hooks did not run")
        if self._reading is not None:
            self._decide(self._reading, columns)
        self._decide(self._judge.read(self._live()), columns)
        self.close()

    def close(self) -> None:
        """Close the cases, each of them even if another cannot be recorded; a second call does nothing."""
        with ExitStack() as stack:
            while self._open:
                stack.callback(self._judge.close, self._open.pop())

    def _judge_step(self, column: int) -> None:
        """Decide on this step's scores, or on those of the step before while this step's are on their way."""
        reading: Reading | None = self._judge.read(self._live())
        if not self._judge.policy.same_step:
            reading, self._reading = self._reading, reading
        if reading is not None:
            self._decide(reading, column)
        self._judged = True

    def _judge_prompt(self) -> bool:
        """Decide at the end of the prompt, and say whether it is to be read again."""
        self._decide(self._judge.read(self._live()), self._mask_BP.shape[1])
        self._judged = True
        patched = [case for case in self.cases if case.decision.action == "patch"]
        if patched:
            empty(self.cache)
        for case in patched:
            case.patched_from = 0
        return bool(patched)

    def _live(self) -> list[Case]:
        return [case for row, case in enumerate(self.cases) if self._alive[row]]

    def _decide(self, reading: Reading, column: int) -> None:
        changed = self._judge.decide(reading)
        self._end_stopped(column)
        if self._on_step is not None:
            self._on_step(reading.cases)
        if changed:
            self._act({row: case for row, case in enumerate(self.cases) if case.acted_on})

    def _end_stopped(self, column: int) -> None:
        for row, case in enumerate(self.cases):
            if case.decision.action == "stop" and self._alive[row]:
                self.stopped_at[row] = column
                case.stopped_after = column - self._mask_BP.shape[1]
                self._alive[row] = False

    def _fold(self, logits_TC: Tensor, sequences: Sequence[SequenceRows]) -> None:
        rows = [RequestRows(self.cases[_row(item)].request, item.rows, item.positions) for item in sequences]
        self._judge.step(logits_TC, rows)

    def _commit_draft(self, past: int) -> None:
        """Fold the first rows of a draft, those that the cache has kept."""
        if self._draft is not None:
            # Rows that were folded already are dropped by their position.
            self._fold(self._draft, [item for item in self._before(past) if self._alive[_row(item)]])
            self._draft = None

    def _before(self, column: int) -> list[SequenceRows]:
        """Return the rows of the last forward pass that lie before a column."""
        assert self._forward is not None
        count = max(0, column - self._forward.past)
        kept = ((item, item.rows % self._forward.tokens < count) for item in self._forward.sequences)
        return [SequenceRows(item.key, item.rows[keep], item.positions[keep]) for item, keep in kept]

    def _retire_ended(self, tokens: Sequence[int]) -> None:
        """Stop scoring rows that have ended: what follows in them is padding."""
        for row, token in enumerate(tokens):
            self._alive[row] = self._alive[row] and token not in self._eos_ids


def _row(item: SequenceRows) -> int:
    assert isinstance(item.key, int)
    return item.key
