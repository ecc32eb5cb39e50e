"""The stream's state at the end of KV blocks: a request that starts after cached tokens goes on from there.

An engine with a prefix cache does not compute tokens again that another request has computed, so their rows never come.
What was known after the last of them is kept here, by block, and lent to a request only if the block holds the very
tokens of its prompt: every entry carries a rolling digest of the tokens up to its end.

Shape letters: K KV blocks, B requests, R rows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from sense_kernels import PROMPT, RESPONSE, TAIL, IntArray, LaneTable
from spider_sense.scoring.stream import Stream

__all__ = ["BlockStates", "TokenChain"]

_NONE = -1
_NO_END = np.array([_NONE])


class TokenChain:
    """Rolling digests of a request's tokens, one a block.

    Args:
        seed: whatever else the state depends on: guard, adapter, tokens that are skipped.
        size: tokens of a block.
    """

    __slots__ = ("_altered", "_digests", "_seed", "_size", "late")

    def __init__(self, seed: str, size: int) -> None:
        self._seed, self._size = seed.encode(), size
        self._digests: list[bytes] = []
        self._altered: int | None = None
        self.late: list[tuple[int, int, int]] = []
        """Blocks that were filled before their last tokens were known: place, block, how often it was filled."""

    def at(self, block: int, tokens: Sequence[int] | IntArray) -> bytes:
        """Return the digest of the request's blocks up to one.

        Args:
            block: its place in the request, from 0.
            tokens: the request's tokens, at least to the end of that block.
        """
        for place in range(len(self._digests), block + 1):
            part = np.asarray(tokens[place * self._size : (place + 1) * self._size], dtype=np.int64)
            before = self._digests[-1] if self._digests else self._seed
            altered = self._altered is not None and (place + 1) * self._size > self._altered
            salt = str(self._altered).encode() if altered else b""
            self._digests.append(hashlib.blake2b(before + part.tobytes(), digest_size=16, salt=salt).digest())
        return self._digests[block]

    def alter(self, position: int) -> None:
        """Tell blocks that reach past a position from those of the same tokens: from there on the model is patched."""
        self._altered = position
        del self._digests[position // self._size :]


class BlockStates:
    """States of all KV blocks of an engine.

    Args:
        table: the lanes of the bank.
        blocks: number of KV blocks K.
        size: tokens of a block.
        device: where the states live.
    """

    def __init__(self, table: LaneTable, blocks: int, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.tables = table.new_state(blocks, device)
        self._digest: list[bytes | None] = [None] * blocks
        self._prompt = [0] * blocks
        self._filled = [0] * blocks
        """How often each was filled: an entry that comes late must not name what another request filled since."""
        # What a generated token adds to such a head is not what the same token adds within a prompt.
        self._prompt_only = any(group.span & PROMPT and not group.span & RESPONSE for group in table.groups)
        self._tail_only = any(group.span & TAIL and not group.span & PROMPT for group in table.groups)

    def ends(
        self,
        positions: IntArray,
        prompt_length: int,
        block_ids: Sequence[int] | IntArray,
        tokens: Sequence[int] | IntArray,
        chain: TokenChain,
        complete: bool,
    ) -> IntArray:
        """Return the block that each row is the last token of, -1 for other rows, and enter those blocks.

        A block whose last tokens the engine has not told yet stays unknown until :meth:`catch_up`.

        Args:
            positions: [R] absolute positions of a request's rows.
            prompt_length: its tokens before the first generated one.
            block_ids: the blocks of the request, from its first token on.
            tokens: its tokens.
            chain: its digests.
            complete: whether its state rests on every token so far; if not, its blocks count as unknown.
        """
        if len(positions) == 1 and (positions[0] + 1) % self.size:
            return _NO_END  # decoding, the hot path
        block_R = np.full(len(positions), _NONE)
        for row in np.flatnonzero((positions + 1) % self.size == 0).tolist():
            place = int(positions[row]) // self.size
            block = int(block_ids[place])
            usable = complete and not (self._prompt_only and positions[row] >= prompt_length)
            self._digest[block], self._prompt[block] = None, prompt_length
            self._filled[block] += 1
            if usable:
                chain.late.append((place, block, self._filled[block]))
                block_R[row] = block
        self.catch_up(tokens, chain)
        return block_R

    def catch_up(self, tokens: Sequence[int] | IntArray, chain: TokenChain) -> None:
        """Enter blocks of a request whose tokens are known by now."""
        waiting, chain.late = chain.late, []
        for place, block, filled in waiting:
            if (place + 1) * self.size > len(tokens):
                chain.late.append((place, block, filled))
            elif self._filled[block] == filled:
                self._digest[block] = chain.at(place, tokens)

    def lend(
        self,
        stream: Stream,
        slot: int,
        cached: int,
        prompt_length: int,
        tail: int,
        block_ids: Sequence[int] | IntArray,
        tokens: Sequence[int] | IntArray,
        chain: TokenChain,
    ) -> bool:
        """Put the state at the end of a cached prefix into a slot.

        Args:
            stream: the state table of running requests.
            slot: a fresh slot.
            cached: tokens of the prefix.
            prompt_length: tokens of the request before the first generated one.
            tail: last of these that the chat template adds.
            block_ids: the blocks of the request.
            tokens: its tokens.
            chain: its digests.

        Returns:
            Whether it was known; if not, the slot is left as it was and the tokens are missing.
        """
        place, beyond = divmod(cached, self.size)
        if beyond or not place or cached > len(tokens):
            return False
        block = int(block_ids[place - 1])
        if self._digest[block] is None or self._digest[block] != chain.at(place - 1, tokens):
            return False
        # Where both prompts end at one token, so do their tails; elsewhere a block knows nothing of this one's tail.
        alike = self._prompt[block] == prompt_length
        if self._tail_only and cached > prompt_length - tail and not alike:
            return False
        stream.take(slot, self.tables, block, whole=alike)
        return True
