"""A scheduler that takes in tokens in a way of its own."""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

__all__ = ["OwnScheduler"]


class OwnScheduler(Scheduler):  # type: ignore[misc]
    """As vLLM's, which it calls."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Do as ever."""
        return super().update_from_output(scheduler_output, model_runner_output)
