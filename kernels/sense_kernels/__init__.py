"""Operations of the hot path: score hidden states, fold the scores into streaming state."""

from sense_kernels.fold import FoldRows, fold_torch, readout_torch
from sense_kernels.lanes import PROMPT, RESPONSE, TAIL, WATCHED, Lane, LaneKind, LaneTable
from sense_kernels.recurrences import MERGE
from sense_kernels.score import score, score_torch, steer, steer_torch

__all__ = [
    "MERGE",
    "PROMPT",
    "RESPONSE",
    "TAIL",
    "WATCHED",
    "FoldRows",
    "Lane",
    "LaneKind",
    "LaneTable",
    "fold_torch",
    "readout_torch",
    "score",
    "score_torch",
    "steer",
    "steer_torch",
]
