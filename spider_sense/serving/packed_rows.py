"""Only seams: how each of vLLM's runners packs the rows of a step.

Both functions return the requests in the order of their rows, where each one's rows begin and the last one's end, and
the absolute position of each one's first row.
"""

from typing import Any

__all__ = ["rows_of_batch", "rows_of_runner"]


def rows_of_runner(runner: Any) -> tuple[Any, Any, Any]:
    """Return what the first runner has packed."""
    batch, count = runner.input_batch, runner.input_batch.num_reqs
    return batch.req_ids[:count], runner.query_start_loc.np[: count + 1], batch.num_computed_tokens_cpu[:count]


def rows_of_batch(batch: Any) -> tuple[Any, Any, Any]:
    """Return what a batch of the second runner holds, which sorts requests that decode to the front."""
    return batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np
