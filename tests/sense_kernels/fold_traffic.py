"""Requests for tests of the fold: their rows and codes, the chunks that they come in, and the steps that feed them.

Shape letters: B requests, n rows of a request, T packed rows of a step, X columns or width, H heads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from sense_kernels import (
    PROMPT,
    RESPONSE,
    TAIL,
    WATCHED,
    FoldRows,
    LaneTable,
    RowTensors,
    State,
    fold,
    fold_torch,
    fold_triton,
)

IntArray = npt.NDArray[np.int64]
Chunks = list[list[int]]
SPARE, CPU = 2, torch.device("cpu")


class Request(NamedTuple):
    """One request."""

    rows_nX: Tensor
    codes_n: IntArray


class Fed(NamedTuple):
    """What the fold left behind, request by request."""

    state: Tensor
    counts: Tensor
    peak: Tensor
    trace: Tensor
    """[rows of all requests, H], 7 where a row is not watched."""


def row_codes(prompt: int, total: int) -> IntArray:
    """Return the codes of a request whose last two prompt tokens are its tail, watched from the last of them on."""
    positions = np.arange(total)
    code: IntArray = np.where(positions < prompt, PROMPT, RESPONSE)
    code |= np.where((positions < prompt) & (positions >= prompt - 2), TAIL, 0)
    code |= np.where(positions >= prompt - 1, WATCHED, 0)
    return code


def requests(lengths: Sequence[tuple[int, int]], columns: int, scale: float = 1.0, seed: int = 0) -> list[Request]:
    """Return random requests of so many (prompt, response) tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Request(torch.randn(prompt + reply, columns, generator=draw) * scale, row_codes(prompt, prompt + reply))
        for prompt, reply in lengths
    ]


def whole(of: Sequence[Request]) -> Chunks:
    """Return one chunk for each request."""
    return [[len(request.codes_n)] for request in of]


def one_by_one(of: Sequence[Request]) -> Chunks:
    """Return a chunk for each row."""
    return [[1] * len(request.codes_n) for request in of]


def prompt_then_steps(of: Sequence[Request]) -> Chunks:
    """Return the prompt as one chunk, then a chunk for each token of the response."""
    prompts = [int(((request.codes_n & PROMPT) != 0).sum()) for request in of]
    return [[n] + [1] * (len(request.codes_n) - n) for n, request in zip(prompts, of, strict=True)]


def halves(request: Request) -> list[int]:
    """Return two chunks for one request."""
    n = len(request.codes_n)
    return [n // 2, n - n // 2]


@st.composite
def cases(draw: st.DrawFn, columns: int, prompt: int, reply: int) -> tuple[list[Request], Chunks, int]:
    """Draw up to 4 requests of at most so many tokens, their chunks, and a seed for the order of rows."""
    seed = draw(st.integers(0, 2**16))
    tokens = st.tuples(st.integers(1, prompt), st.integers(0, reply))
    of = requests(draw(st.lists(tokens, min_size=1, max_size=4)), columns, draw(st.sampled_from([0.1, 1.0, 8.0])), seed)
    chunks: Chunks = []
    for request in of:
        chunks.append([])
        while left := len(request.codes_n) - sum(chunks[-1]):
            chunks[-1].append(draw(st.integers(1, left)))
    return of, chunks, seed


Run = Callable[..., None]
"""Fold one step: state, rows [T, X], whose they are, lanes, trace or None, state of the blocks or None."""


def run_torch(
    state: State,
    logits: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold with the twin."""
    fold_torch(*state, logits, rows, table, trace, blocks)


def run_cpu(
    state: State,
    logits: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold on the CPU's path, which has a function of its own for steps of one row each."""
    fold(*state, logits, rows, table, trace, blocks)


def run_triton(
    state: State,
    logits: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold with the kernel."""
    fold_triton(*state, logits, rows.to(CPU), table, trace, blocks)


def step_rows(rows: FoldRows, packed: int) -> RowTensors:
    """Return the rows as tensors: of a decode step if all packed rows are taken, one of each request in turn."""
    tensors = rows.to(CPU)
    decode = rows.one_each and np.array_equal(rows.row_R, np.arange(packed))
    return tensors._replace(row=None, start=None) if decode else tensors


def feed(run: Run, table: LaneTable, of: Sequence[Request], chunks: Chunks, seed: int = 0, padding: int = 3) -> Fed:
    """Interleave the chunks of all requests at random, scatter their rows among NaN rows, and fold step by step.

    Without padding the rows of a step are packed in the order of its requests. Spare slots, and rows of the trace that
    are not watched, are checked to be left alone.
    """
    rng = np.random.default_rng(seed)
    slot_B = rng.permutation(len(of) + SPARE)[: len(of)]
    state = table.new_state(len(of) + SPARE)
    spare = np.setdiff1d(np.arange(len(of) + SPARE), slot_B)
    for tensor in state:
        tensor[spare] = 7
    traces = [torch.empty(len(request.codes_n), table.heads) for request in of]
    done, queue = [0] * len(of), [list(lengths) for lengths in chunks]
    while any(queue):
        active = [int(i) for i in rng.permutation(len(of)) if queue[i] and rng.random() < 0.7]
        parts = [slice(done[i], done[i] + queue[i].pop(0)) for i in active]
        total = sum(part.stop - part.start for part in parts)
        place = rng.permutation(total + padding)[:total] if padding else np.arange(total)
        if not total:
            continue
        rows_TX = torch.full((total + padding, of[0].rows_nX.shape[1]), torch.nan, dtype=of[0].rows_nX.dtype)
        rows_TX[place] = torch.cat([of[i].rows_nX[part] for i, part in zip(active, parts, strict=True)])
        codes = np.concatenate([of[i].codes_n[part] for i, part in zip(active, parts, strict=True)])
        start = np.cumsum([0] + [part.stop - part.start for part in parts])
        trace = torch.full((total + padding, table.heads), 7.0)
        run(state, rows_TX, FoldRows(place, codes, start, slot_B[active]), table, trace)
        watched = place[(codes & WATCHED) != 0]
        assert (trace[np.setdiff1d(np.arange(len(trace)), watched)] == 7.0).all()
        for i, part, first in zip(active, parts, start[:-1], strict=True):
            traces[i][part] = trace[place[first : first + part.stop - part.start]]
            done[i] = part.stop
    assert all((tensor[spare] == 7).all() for tensor in state)
    floats, counts, peak = (tensor[slot_B] for tensor in state)
    return Fed(floats, counts, peak, torch.cat(traces))


def assert_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Check that two runs left the same bits behind, but for those of NaN."""
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        bits = [torch.where(x.isnan(), 7, x).view(torch.int32) for x in (one, other)]
        assert one.isnan().equal(other.isnan()), index
        assert bits[0].equal(bits[1]), index


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """Check that two runs left the same behind, up to a tolerance relative to max(1, |x|)."""
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        finite = one.isfinite()
        assert finite.equal(other.isfinite()), index
        assert one[~finite].nan_to_num().equal(other[~finite].nan_to_num()), index
        error = (one[finite] - other[finite]).abs() / one[finite].abs().clamp(min=1)
        assert error.max().item() <= tolerance if len(error) else True, (index, error.max().item())
