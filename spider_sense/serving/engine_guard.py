"""A guard in the worker of an engine: names the rows of each step, folds what was accepted, and says what is found.

It reads the scheduler's step (which requests, tokens and KV blocks) and is told in which order the runner packed their
rows; nothing here imports the engine.

Shape letters: T packed rows, B requests of a step.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor

from spider_sense.errors import MismatchError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.policy import Policy
from spider_sense.scoring import BlockStates, Request, RequestRows, TokenChain
from spider_sense.serving.asked import asked_of
from spider_sense.serving.engine_step import Served, Step
from spider_sense.serving.findings import Findings, findings_of
from spider_sense.serving.origin import is_canary, principal_of
from spider_sense.serving.settings import PATCHED

__all__ = ["EngineGuard"]

_NO_END = 1 << 62
"""Length of a prompt that never ends: every row of such a request is a prompt row."""


class EngineGuard:
    """Judges the requests of one engine.

    Args:
        judge: scores and decides.
        decode: makes text of a prompt for an audit log that is to hold it; None for one that is not.
        longest: tokens that a request of this engine may have in all.
    """

    def __init__(
        self, judge: Judge, decode: Callable[[Sequence[int]], str] | None = None, longest: int = _NO_END
    ) -> None:
        self.judge, self._decode, self._longest = judge, decode, longest
        self._served: dict[str, Served] = {}
        self._blocks: tuple[int, int] | None = None
        self._before: tuple[Guard, Policy] | None = None
        self._step = Step()
        # Where an engine looks ahead, tokens of one step arrive on another thread while the next step begins.
        self._lock = threading.Lock()

    @property
    def block_bytes(self) -> int:
        """Memory that the state at the end of one KV block takes."""
        return sum(part.nbytes for part in self.judge.bank.table.new_state(1))

    def keep_blocks(self, size: int, blocks: int) -> None:
        """Keep the state at the end of KV blocks, for requests that start after cached ones.

        Args:
            size: tokens of a block.
            blocks: their number.
        """
        bank = self.judge.bank
        self._blocks = size, blocks
        self.judge.scorer.blocks = BlockStates(bank.table, blocks, size, bank.device)

    def exchange(self, guard: Guard, policy: Policy) -> None:
        """Go on with another guard of the same model, sites and columns; of the KV blocks nothing is known then.

        Raises:
            SpiderSenseError: if it is not, or requests still run; nothing is changed then.
        """
        with self._lock:
            if self._served:
                raise SpiderSenseError(
                    f"{len(self._served)} requests still run, or were preempted; try again when they have ended"
                )
            if guard.manifest.template != self.judge.guard.manifest.template:
                raise MismatchError(
                    f"the guard was made for the template {guard.manifest.template}, not for "
                    f"{self.judge.guard.manifest.template}; train or calibrate a guard for this model"
                )
            before = self.judge.guard, self.judge.policy
            self.judge.exchange(guard, policy)
            self._before = before
            if self._blocks is not None:
                self.keep_blocks(*self._blocks)

    def restore(self) -> None:
        """Undo the last exchange."""
        if self._before is not None:
            self.exchange(*self._before)

    @property
    def waiting(self) -> bool:
        """Whether a pass has run whose tokens are not known yet."""
        return bool(self._step.served)

    def begin(self, step: Any) -> None:
        """Take in what the scheduler decided, before the forward pass.

        Args:
            step: vLLM's ``SchedulerOutput``.
        """
        with self._lock:
            for name, position in getattr(step, PATCHED, {}).items():
                self._patch(name, position)
            for name in step.finished_req_ids:
                self._close(name)
            for new in step.scheduled_new_reqs:
                self._open(new)
            self._continue(step.scheduled_cached_reqs)
            drafts = {name: len(tokens) for name, tokens in step.scheduled_spec_decode_tokens.items()}
            self._step = Step(step.total_num_scheduled_tokens, drafts=drafts)
            self.judge.bank.begin(self._step.total)

    def rows(self, ids: Sequence[str], starts: Sequence[int], positions: Sequence[int]) -> None:
        """Say how the rows of the pass that has just run are packed.

        Args:
            ids: B requests in the order of their rows.
            starts: first row of each, and the end of the last; B + 1 numbers.
            positions: absolute position of each request's first row.

        Raises:
            SpiderSenseError: if the rows are not those of the step.
        """
        total = self._step.total
        if int(starts[len(ids)]) != total:
            raise SpiderSenseError(
                f"the engine packed {starts[len(ids)]} rows for a step of {total} tokens, so they cannot be told "
                "apart; this version or option of the engine is not supported"
            )
        self._step.served = [self._served[name] for name in ids]
        self._step.start_B = np.asarray(starts).tolist()
        self._step.position_B = np.asarray(positions).tolist()

    def fold(self) -> Step:
        """Fold the rows that are certain as they are, all but drafts, and start reading; nothing waits for a device."""
        started = time.perf_counter()
        with self._lock:
            step, self._step = self._step, Step()
            logits_TC = self.judge.bank.logits(step.total)
            if step.decodes:
                requests = [served.case.request for served in step.served]
                self.judge.scorer.decode(logits_TC, requests, self._completed(step))
            else:
                self._fold_rows(logits_TC, step)
            if not step.drafts:
                step.reading = self.judge.read([served.case for served in step.served])
            step.seconds = time.perf_counter() - started
            return step

    def settle(self, step: Step, accepted: Mapping[str, Sequence[int]]) -> Findings:
        """Take in the tokens of a step, fold the drafts that they accept, and judge.

        Args:
            step: what :meth:`fold` returned.
            accepted: tokens that were sampled for each request.

        Returns:
            What is found of each request of the step that still runs.
        """
        started = time.perf_counter()
        with self._lock:
            for served in step.served:
                served.tokens += accepted.get(served.case.request.id, ())
            cases = [served.case for served in step.served]
            if step.reading is None:
                self.judge.step(self.judge.bank.logits(step.total), list(self._drafted(step, accepted)))
                step.reading = self.judge.read(cases)
            for served in step.served:
                if self.judge.scorer.blocks is not None and served.chain is not None and served.chain.late:
                    self.judge.scorer.blocks.catch_up(served.tokens, served.chain)
            stricter = self.judge.decide(step.reading)
            seconds = step.seconds + time.perf_counter() - started
            extraction, unrecorded = self.judge.prompts.take_counts(), self.judge.recorder.take_lost()
            return findings_of(cases, seconds, stricter, extraction, unrecorded)

    def close(self) -> None:
        """Close every request, each of them even if another cannot be recorded."""
        with ExitStack() as stack:
            for name in list(self._served):
                stack.callback(self._close, name)

    def _fold_rows(self, logits_TC: Tensor, step: Step) -> None:
        waiting = list(step.rows())
        while waiting:
            # A request may begin after blocks that another one fills in this very step.
            ready = [item for item in waiting if self._borrow(item[0])] or waiting
            batch: list[RequestRows] = []
            for served, rows, positions in ready:
                served.cached = 0  # what is still owed now counts as missing
                batch += self._split(served, rows[: step.sure(served, rows)], positions)
            self.judge.step(logits_TC, batch)
            done = {id(served) for served, _, _ in ready}
            waiting = [item for item in waiting if id(item[0]) not in done]

    def _drafted(self, step: Step, accepted: Mapping[str, Sequence[int]]) -> Iterator[RequestRows]:
        """Yield the rows of drafts that were accepted."""
        for served, rows, positions in step.rows():
            sure, new = step.sure(served, rows), accepted.get(served.case.request.id, ())
            kept = slice(sure, sure + max(0, len(new) - 1))
            if kept.stop > sure:
                yield from self._split(served, rows[kept], positions[kept])

    def _completed(self, step: Step) -> np.ndarray | None:
        """Return the KV block [B] that each row of a decode step is the last token of, or -1."""
        states = self.judge.scorer.blocks
        if states is None:
            return None
        position_B = np.array(step.position_B)
        block_B = np.full(len(position_B), -1)
        for place in np.flatnonzero((position_B + 1) % states.size == 0):
            served, here = step.served[place], slice(place, place + 1)
            ended = self._with_blocks(served, served.case.request, position_B[here], position_B[here]).blocks
            block_B[here] = -1 if ended is None else ended
        return block_B

    def _split(self, served: Served, rows: np.ndarray, positions: np.ndarray) -> Iterator[RequestRows]:
        """Yield the rows that are computed for the first time, and those that are computed again."""
        request, again = served.case.request, served.again
        positions = positions[: len(rows)]
        fresh = int(positions.searchsorted(request.position))
        if again is not None and fresh:
            yield self._with_blocks(served, again, rows[:fresh], positions[:fresh])
        if fresh < len(rows):
            if again is not None:
                self.judge.scorer.close(again)
                served.again = None
            yield self._with_blocks(served, request, rows[fresh:], positions[fresh:])

    def _with_blocks(self, served: Served, request: Request, rows: np.ndarray, positions: np.ndarray) -> RequestRows:
        states, chain = self.judge.scorer.blocks, served.chain
        if states is None or chain is None:
            return RequestRows(request, rows, positions)
        complete = not request.missing and int(positions[0]) <= request.position
        ends = states.ends(positions, request.prompt_length, served.blocks, served.tokens, chain, complete)
        return RequestRows(request, rows, positions, ends)

    def _continue(self, cached: Any) -> None:
        """Take in the new blocks of requests that run on, and what preempted ones compute again."""
        for place, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[place]
            served = self._served.get(name)
            if served is None:
                raise SpiderSenseError(f"request {name} runs, but the guard never saw it begin")
            if name in cached.resumed_req_ids:
                served.blocks = list(blocks[0]) if blocks else []
                self._compute_again(served, int(cached.num_computed_tokens[place]))
            elif blocks:
                served.blocks += blocks[0]

    def _patch(self, name: str, position: int) -> None:
        """Note where a request's patch begins, before its blocks are told from others'."""
        served = self._served[name]
        if served.case.patched_from is None:
            served.case.patched_from = position
            if position == 0:
                # It is read again: the token that followed the first reading was thrown away.
                del served.tokens[served.case.request.prompt_length :]
            if served.chain is not None:
                served.chain.alter(position)

    def _open(self, new: Any) -> None:
        prompt, name = list(new.prompt_token_ids or ()), new.req_id
        known = self._served.get(name)
        if known is not None and known.tokens[: known.case.request.prompt_length] == prompt:
            # Preempted, and back: the second runner gets such requests as new ones.
            known.blocks = list(new.block_ids[0])
            self._compute_again(known, new.num_computed_tokens)
            return
        self._close(name)
        text = None if self._decode is None else self._decode(prompt)
        asked = asked_of(new, self._longest) if self.judge.prompts.watched else None
        # The list grows with the answer.
        kept = tuple(prompt) if asked else prompt
        principal, canary = principal_of(new.sampling_params), is_canary(new.sampling_params)
        case = self.judge.open(name, kept, principal, text, asked, canary)
        chain = None
        if self.judge.scorer.blocks is not None:
            chain = TokenChain(f"{self.judge.digest}/{case.request.skip}", self.judge.scorer.blocks.size)
        blocks = list(new.block_ids[0]) if new.block_ids else []
        self._served[name] = Served(case, prompt, blocks, chain, cached=new.num_computed_tokens)

    def _borrow(self, served: Served) -> bool:
        """Let a request go on from its cached blocks, if it has not yet; return whether it has all that it needs."""
        return not served.cached or self._lend(served, served.case.request, served.cached)

    def _lend(self, served: Served, request: Request, cached: int) -> bool:
        """Go on from the state of cached blocks; where it is not known they count as missing with the next row."""
        states, chain = self.judge.scorer.blocks, served.chain
        if states is None or chain is None:
            return False
        # Nothing is folded of the tokens that are skipped, so nothing need be known of them.
        if cached <= request.skip or states.lend(
            self.judge.scorer.stream,
            request.slot,
            cached,
            request.prompt_length,
            request.tail,
            served.blocks,
            served.tokens,
            chain,
        ):
            request.cached += cached - request.position
            request.position = cached
            return True
        return False

    def _compute_again(self, served: Served, cached: int) -> None:
        if served.again is not None:
            self.judge.scorer.close(served.again)
            served.again = None
        if cached > served.case.request.position:
            # Another request has filled more of the prompt meanwhile.
            served.cached = cached
        elif cached < served.case.request.position:
            skip = served.case.request.skip
            served.again = self.judge.scorer.open(f"{served.case.request.id}, again", _NO_END, skip, 0)
            if cached:
                self._lend(served, served.again, cached)

    def _close(self, name: str) -> None:
        served = self._served.pop(name, None)
        if served is None:
            return
        with ExitStack() as stack:
            stack.callback(self.judge.close, served.case)
            if served.again is not None:
                stack.callback(self.judge.scorer.close, served.again)
