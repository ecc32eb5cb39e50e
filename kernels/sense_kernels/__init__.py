"""Operations of the hot path: score hidden states, fold the scores into streaming state."""

from sense_kernels._triton import AVAILABLE
from sense_kernels.fold import fold, fold_torch, fold_triton
from sense_kernels.host_sites import HostSites
from sense_kernels.lane_table import LaneTable, State
from sense_kernels.lanes import PROMPT, RESPONSE, TAIL, WATCHED, Lane, LaneKind
from sense_kernels.launch import WARM_ROWS, MatchScratch, Scratch, new_match_scratch, new_scratch
from sense_kernels.patch import (
    PatchDots,
    launch_patch_dots,
    launch_patch_update,
    patch_rows,
    patch_rows_torch,
    patch_rows_triton,
)
from sense_kernels.recurrences import MERGE
from sense_kernels.rows import FoldRows, IntArray, RowTensors
from sense_kernels.score import pack_weight, score, score_torch, score_triton, split_weight
from sense_kernels.score_fold import score_fold, score_fold_torch
from sense_kernels.signatures import (
    match_signatures,
    match_signatures_torch,
    match_signatures_triton,
    quantise_signatures,
)
from sense_kernels.steer import steer, steer_torch
from sense_kernels.twin import readout_torch

__all__ = [
    "AVAILABLE",
    "MERGE",
    "PROMPT",
    "RESPONSE",
    "TAIL",
    "WARM_ROWS",
    "WATCHED",
    "FoldRows",
    "HostSites",
    "IntArray",
    "Lane",
    "LaneKind",
    "LaneTable",
    "MatchScratch",
    "PatchDots",
    "RowTensors",
    "Scratch",
    "State",
    "fold",
    "fold_torch",
    "fold_triton",
    "launch_patch_dots",
    "launch_patch_update",
    "match_signatures",
    "match_signatures_torch",
    "match_signatures_triton",
    "new_match_scratch",
    "new_scratch",
    "pack_weight",
    "patch_rows",
    "patch_rows_torch",
    "patch_rows_triton",
    "quantise_signatures",
    "readout_torch",
    "score",
    "score_fold",
    "score_fold_torch",
    "score_torch",
    "score_triton",
    "split_weight",
    "steer",
    "steer_torch",
]
