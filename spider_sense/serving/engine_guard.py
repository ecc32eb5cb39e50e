"""A guard in the worker of an engine: names the rows of each step, folds what was accepted, and says what is found.

It reads the scheduler's step (which requests, tokens and KV blocks) and is told in which order the runner packed their
rows; nothing here imports the engine.

Shape letters: T packed rows, B requests of a step.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from spider_sense.errors import MismatchError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.policy import Policy
from spider_sense.scoring import RequestRows
from spider_sense.serving.asked import asked_of
from spider_sense.serving.engine_step import NO_END, RunningRequest, Step
from spider_sense.serving.findings import Findings, findings_of
from spider_sense.serving.kv_states import KvStates
from spider_sense.serving.origin import is_canary, principal_of
from spider_sense.serving.settings import PATCHED

__all__ = ["EngineGuard"]


class EngineGuard:
    """Judges the requests of one engine.

    Args:
        judge: scores and decides.
        decode: makes text of a prompt for an audit log that is to hold it; None for one that is not.
        longest: tokens that a request of this engine may have in all.
    """

    def __init__(
        self, judge: Judge, decode: Callable[[Sequence[int]], str] | None = None, longest: int = NO_END
    ) -> None:
        self.judge, self.kv_states = judge, KvStates(judge)
        self._decode, self._longest = decode, longest
        self._running: dict[str, RunningRequest] = {}
        self._before: tuple[Guard, Policy] | None = None
        self._warming = False
        self._step = Step()
        # Where an engine looks ahead, tokens of one step arrive on another thread while the next step begins.
        self._lock = threading.Lock()

    def exchange(self, guard: Guard, policy: Policy) -> None:
        """Go on with another guard of the same model, sites and columns; of the KV blocks nothing is known then.

        Raises:
            SpiderSenseError: if it is not, or requests still run; nothing is changed then.
        """
        with self._lock:
            if self._running:
                raise SpiderSenseError(
                    f"{len(self._running)} requests still run, or were preempted; try again when they have ended"
                )
            if guard.manifest.template != self.judge.guard.manifest.template:
                raise MismatchError(
                    f"the guard was made for the template {guard.manifest.template}, not for "
                    f"{self.judge.guard.manifest.template}; train or calibrate a guard for this model"
                )
            before = self.judge.guard, self.judge.policy
            self.judge.exchange(guard, policy)
            self._before = before
            self.kv_states.renew()

    def restore(self) -> None:
        """Undo the last exchange."""
        if self._before is not None:
            self.exchange(*self._before)

    @contextmanager
    def warming(self) -> Iterator[None]:
        """What an engine runs to warm up is folded, for its kernels to be compiled, and is nobody's request: it is
        neither recorded nor told to extraction."""
        self._warming = True
        try:
            with self.judge.recorder.silent():
                yield
                self.close()
        finally:
            self._warming = False

    @property
    def waiting(self) -> bool:
        """Whether a pass has run whose tokens are not known yet."""
        return bool(self._step.running)

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
            starts: first row of each, and the end of the last; B + 1 numbers or more.
            positions: absolute position of each request's first row; B numbers or more.

        Raises:
            SpiderSenseError: if the rows are not those of the step.
        """
        total = self._step.total
        if int(starts[len(ids)]) != total:
            raise SpiderSenseError(
                f"the engine packed {starts[len(ids)]} rows for a step of {total} tokens, so they cannot be told "
                "apart; this version or option of the engine is not supported"
            )
        self._step.running = [self._running[name] for name in ids]
        # A graph of a fixed size packs requests that are none behind them.
        self._step.start_B = np.asarray(starts)[: len(ids) + 1].tolist()
        self._step.position_B = np.asarray(positions)[: len(ids)].tolist()

    def fold(self) -> Step:
        """Fold the rows that are certain as they are, all but drafts, and start reading; nothing waits for a device."""
        started = time.perf_counter()
        with self._lock:
            step, self._step = self._step, Step()
            logits_TC = self.judge.bank.logits(step.total)
            place_B = step.decoding()
            if len(place_B):
                requests = [step.running[place].case.request for place in place_B]
                row_B = np.asarray(step.start_B)[place_B]
                self.judge.scorer.decode(logits_TC, row_B, requests, self.kv_states.completed(step, place_B))
            if len(place_B) < len(step.running):
                self._fold_rows(logits_TC, step, np.setdiff1d(np.arange(len(step.running)), place_B).tolist())
            if not step.drafts:
                step.reading = self.judge.read([running.case for running in step.running])
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
        if step.reading is not None:
            # Not while the lock is held, which the next step needs.
            step.reading.wait()
        with self._lock:
            for running in step.running:
                running.tokens += accepted.get(running.case.request.id, ())
            cases = [running.case for running in step.running]
            if step.reading is None:
                self.judge.step(self.judge.bank.logits(step.total), list(self._drafted(step, accepted)))
                step.reading = self.judge.read(cases)
            self.kv_states.catch_up(step)
            stricter = self.judge.decide(step.reading)
            seconds = step.seconds + time.perf_counter() - started
            extraction, unrecorded = self.judge.prompts.take_counts(), self.judge.recorder.take_lost()
            return findings_of(cases, seconds, stricter, extraction, unrecorded)

    def close(self) -> None:
        """Close every request, each of them even if another cannot be recorded."""
        with ExitStack() as stack:
            for name in list(self._running):
                stack.callback(self._close, name)

    def _fold_rows(self, logits_TC: Tensor, step: Step, places: Sequence[int]) -> None:
        waiting = list(step.rows(places))
        while waiting:
            # A request may begin after blocks that another one fills in this very step.
            ready = [item for item in waiting if self.kv_states.borrow(item[0])] or waiting
            batch: list[RequestRows] = []
            for running, rows, positions in ready:
                running.cached = 0  # what is still owed now counts as missing
                batch += self.kv_states.split(running, rows[: step.sure(running, rows)], positions)
            self.judge.step(logits_TC, batch)
            done = {id(running) for running, _, _ in ready}
            waiting = [item for item in waiting if id(item[0]) not in done]

    def _drafted(self, step: Step, accepted: Mapping[str, Sequence[int]]) -> Iterator[RequestRows]:
        """Yield the rows of drafts that were accepted."""
        for running, rows, positions in step.rows():
            sure, new = step.sure(running, rows), accepted.get(running.case.request.id, ())
            kept = slice(sure, sure + max(0, len(new) - 1))
            if kept.stop > sure:
                yield from self.kv_states.split(running, rows[kept], positions[kept])

    def _continue(self, cached: Any) -> None:
        """Take in the new blocks of requests that run on, and what preempted ones compute again."""
        for place, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[place]
            running = self._running.get(name)
            if running is None:
                raise SpiderSenseError(f"request {name} runs, but the guard never saw it begin")
            if name in cached.resumed_req_ids:
                running.blocks = list(blocks[0]) if blocks else []
                self.kv_states.compute_again(running, int(cached.num_computed_tokens[place]))
            elif blocks:
                running.blocks += blocks[0]

    def _patch(self, name: str, position: int) -> None:
        """Note where a request's patch begins, before its blocks are told from others'."""
        running = self._running[name]
        if running.case.patched_from is None:
            running.case.patched_from = position
            if position == 0:
                # It is read again: the token that followed the first reading was thrown away.
                del running.tokens[running.case.request.prompt_length :]
            if running.chain is not None:
                running.chain.alter(position)

    def _open(self, new: Any) -> None:
        prompt, name = list(new.prompt_token_ids or ()), new.req_id
        known = self._running.get(name)
        if known is not None and known.tokens[: known.case.request.prompt_length] == prompt:
            # Preempted, and back: the second runner gets such requests as new ones.
            known.blocks = list(new.block_ids[0])
            self.kv_states.compute_again(known, new.num_computed_tokens)
            return
        self._close(name)
        text = None if self._decode is None else self._decode(prompt)
        own = self._warming or is_canary(new.sampling_params)
        asked = asked_of(new, self._longest) if self.judge.prompts.watched and not own else None
        # The list grows with the answer.
        kept = tuple(prompt) if asked else prompt
        case = self.judge.open(name, kept, principal_of(new.sampling_params), text, asked, own)
        blocks = list(new.block_ids[0]) if new.block_ids else []
        self._running[name] = RunningRequest(
            case, prompt, blocks, self.kv_states.chain(case), cached=new.num_computed_tokens
        )

    def _close(self, name: str) -> None:
        running = self._running.pop(name, None)
        if running is None:
            return
        with ExitStack() as stack:
            stack.callback(self.judge.close, running.case)
            stack.callback(self.kv_states.close, running)
