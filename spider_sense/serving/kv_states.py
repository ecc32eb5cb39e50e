"""What a guard knows at the end of an engine's KV blocks: where requests go on from after cached or lost tokens.

Shape letters: B requests of a step, R rows of a request.
"""

from collections.abc import Iterator

import numpy as np

from spider_sense.case import Case
from spider_sense.judge import Judge
from spider_sense.scoring import BlockStates, Request, RequestRows, TokenChain
from spider_sense.serving.engine_step import NO_END, RunningRequest, Step

__all__ = ["KvStates"]


class KvStates:
    """The states at the end of KV blocks, once it is told how many blocks there are; without any, nothing is cached.

    Args:
        judge: whose scorer writes them.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._blocks: tuple[int, int] | None = None

    @property
    def block_bytes(self) -> int:
        """Memory that the state at the end of one KV block takes."""
        return sum(part.nbytes for part in self._judge.bank.table.new_state(1))

    def keep(self, size: int, blocks: int) -> None:
        """Keep the state at the end of KV blocks, for requests that start after cached ones.

        Args:
            size: tokens of a block.
            blocks: their number.
        """
        bank = self._judge.bank
        self._blocks = size, blocks
        self._judge.scorer.blocks = BlockStates(bank.table, blocks, size, bank.device)

    def renew(self) -> None:
        """Begin anew, knowing nothing of any block: the judge has another guard."""
        if self._blocks is not None:
            self.keep(*self._blocks)

    def chain(self, case: Case) -> TokenChain | None:
        """Return the digests of a new request's blocks."""
        states = self._judge.scorer.blocks
        return None if states is None else TokenChain(f"{self._judge.digest}/{case.request.skip}", states.size)

    def completed(self, step: Step, place_B: np.ndarray) -> np.ndarray | None:
        """Return the KV block [B] that each decoded row of a step is the last token of, or -1.

        Args:
            step: the step.
            place_B: int64, places of the requests that decode.
        """
        states = self._judge.scorer.blocks
        if states is None:
            return None
        position_B = np.array(step.position_B)[place_B]
        block_B = np.full(len(position_B), -1)
        for place in np.flatnonzero((position_B + 1) % states.size == 0):
            running, here = step.running[place_B[place]], slice(place, place + 1)
            ended = self._with_blocks(running, running.case.request, position_B[here], position_B[here]).blocks
            block_B[here] = -1 if ended is None else ended
        return block_B

    def split(self, running: RunningRequest, rows: np.ndarray, positions: np.ndarray) -> Iterator[RequestRows]:
        """Yield the rows that are computed for the first time, and those that are computed again.

        Args:
            running: the request.
            rows: R places of its rows in the step.
            positions: absolute position of each, and maybe of rows after them.
        """
        request, again = running.case.request, running.again
        positions = positions[: len(rows)]
        fresh = int(positions.searchsorted(request.position))
        if again is not None and fresh:
            yield self._with_blocks(running, again, rows[:fresh], positions[:fresh])
        if fresh < len(rows):
            self.close(running)
            yield self._with_blocks(running, request, rows[fresh:], positions[fresh:])

    def _with_blocks(
        self, running: RunningRequest, request: Request, rows: np.ndarray, positions: np.ndarray
    ) -> RequestRows:
        states, chain = self._judge.scorer.blocks, running.chain
        if states is None or chain is None:
            return RequestRows(request, rows, positions)
        complete = not request.missing and int(positions[0]) <= request.position
        ends = states.ends(positions, request.prompt_length, running.blocks, running.tokens, chain, complete)
        return RequestRows(request, rows, positions, ends)

    def catch_up(self, step: Step) -> None:
        """Enter blocks of the requests of a step whose tokens are known by now."""
        states = self._judge.scorer.blocks
        if states is None:
            return
        for running in step.running:
            if running.chain is not None and running.chain.late:
                states.catch_up(running.tokens, running.chain)

    def borrow(self, running: RunningRequest) -> bool:
        """Let a request go on from its cached blocks, if it has not yet; return whether it has all that it needs."""
        return not running.cached or self._lend(running, running.case.request, running.cached)

    def _lend(self, running: RunningRequest, request: Request, cached: int) -> bool:
        """Go on from the state of cached blocks; where it is not known they count as missing with the next row."""
        states, chain = self._judge.scorer.blocks, running.chain
        if states is None or chain is None:
            return False
        # Nothing is folded of the tokens that are skipped, so nothing need be known of them.
        if cached <= request.skip or states.lend(
            self._judge.scorer.stream,
            request.slot,
            cached,
            request.prompt_length,
            request.tail,
            running.blocks,
            running.tokens,
            chain,
        ):
            request.cached += cached - request.position
            request.position = cached
            return True
        return False

    def compute_again(self, running: RunningRequest, cached: int) -> None:
        """Take back a request that was preempted, after some cached tokens: what follows them is computed again."""
        self.close(running)
        request = running.case.request
        if cached > request.position:
            # Another request has filled more of the prompt meanwhile.
            running.cached = cached
        elif cached < request.position:
            running.again = self._judge.scorer.open(f"{request.id}, again", NO_END, request.skip, 0)
            if cached:
                self._lend(running, running.again, cached)

    def close(self, running: RunningRequest) -> None:
        """Give up the state of tokens that a request computed again."""
        if running.again is not None:
            self._judge.scorer.close(running.again)
            running.again = None
