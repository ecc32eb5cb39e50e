"""The guard in vLLM's scheduler: ends requests that are to be stopped, and puts the verdict into the answers."""

from collections.abc import Callable, Mapping
from typing import Any

from spider_sense.errors import SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.serving.findings import Findings
from spider_sense.serving.settings import KEY, ServingSettings

__all__ = ["Actor"]


class Actor:
    """Acts on the findings of each step.

    Args:
        settings: what the server was told.
        refusal: token ids of the refusal, and of what sets it apart from an answer that has begun.
    """

    def __init__(self, settings: ServingSettings, refusal: tuple[list[int], list[int]]) -> None:
        guard = Guard.from_pretrained(settings.guard)
        self._detectors = tuple(detector.name for detector in guard.manifest.detectors)
        self._digest, self._scores = guard.digest, settings.scores
        self._refusal, self._break = refusal
        self._latest: dict[str, tuple[Findings, int]] = {}

    def update(self, original: Callable[..., Any], scheduler: Any, step: Any, output: Any) -> Any:
        """Run the scheduler's own update with the tokens of stopped requests taken away, and end those requests.

        Raises:
            SpiderSenseError: if rows were computed and nothing is found of them: the guard does not run.
        """
        findings: Findings | None = getattr(output, "spider_sense", None)
        if findings is None:
            if step.total_num_scheduled_tokens:
                raise SpiderSenseError(
                    "the worker computed a step and no guard says anything of it; see the worker's log for why"
                )
            return original(step, output)
        self._latest |= {name: (findings, row) for row, name in enumerate(findings.ids)}
        stopped = {name for name in findings.stops if _runs(scheduler, name)}
        for name in stopped:
            output.sampled_token_ids[output.req_id_to_index[name]] = []
        outputs = original(step, output)
        self._stop(scheduler, stopped, findings, outputs)
        for one in (one for group in outputs.values() for one in group.outputs):
            if one.finish_reason is not None:
                one.kv_transfer_params = {**(one.kv_transfer_params or {}), KEY: self._answer(one.request_id)}
        for name in [name for name in self._latest if name not in scheduler.requests]:
            del self._latest[name]
        return outputs

    def _stop(self, scheduler: Any, names: set[str], findings: Findings, outputs: dict[int, Any]) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
        from vllm.v1.request import RequestStatus

        for name in names:
            request = scheduler.requests[name]
            tokens = [*(self._break if request.num_output_tokens else ()), *self._refusal]
            prefill = request.take_prefill_stats()
            if prefill is not None:
                prefill.finalize(scheduler.kv_cache_manager.estimate_cached_tokens(request))
            scheduler.finish_requests(name, RequestStatus.FINISHED_STOPPED)
            group = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            group.outputs.append(
                EngineCoreOutput(
                    request_id=name,
                    new_token_ids=tokens,
                    finish_reason=request.get_finished_reason(),
                    stop_reason=f"{KEY}: {findings.stops[name].reason}",
                    events=request.take_events(),
                    prefill_stats=prefill,
                    trace_headers=request.trace_headers,
                )
            )

    def _answer(self, name: str) -> Mapping[str, Any] | None:
        found = self._latest.get(name)
        return None if found is None else found[0].answer(found[1], self._detectors, self._digest, self._scores)


def _runs(scheduler: Any, name: str) -> bool:
    request = scheduler.requests.get(name)
    return request is not None and not request.is_finished()
