"""Run one vLLM engine over prompts, in this process: ``python engine_job.py JOB.json RESULT.json``.

An engine leaves traces in its process, so every configuration that is tested gets a process of its own.
"""

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Return which runner the engine has, what came of each prompt of every round, and how often one was preempted.

    In the place of a prompt a number stands for the whole conversation of that request in the round before. With
    ``adapter``, the folder of a LoRA adapter, every second prompt of a round is for that adapter. With ``refused``,
    options of engines that are not to start, return what each of them said instead.
    """
    from vllm import LLM, SamplingParams

    if "refused" in job:
        return {"refused": [_refusal(LLM, options) for options in job["refused"]]}
    if job["engine"].get("async_scheduling"):
        _look_ahead()
    preempted = _count_preemptions()
    engine = LLM(**job["engine"])
    if job["dummy_batches"]:
        engine.llm_engine.step = _after_a_dummy_batch(engine, engine.llm_engine.step)
    runners = engine.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    rounds: list[list[dict[str, Any]]] = []
    for wanted, sampling in zip(job["rounds"], job["sampling"], strict=True):
        prompts = [
            rounds[-1][one]["prompt"] + rounds[-1][one]["tokens"] if isinstance(one, int) else one for one in wanted
        ]
        answers = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(**sampling),
            use_tqdm=False,
            lora_request=_every_second(job["adapter"], len(prompts)),
        )
        rounds.append([_told(one, completion) for one in answers for completion in one.outputs])
    core = engine.llm_engine.engine_core
    looks_ahead = hasattr(core, "engine_core") and core.engine_core.batch_queue is not None
    return {"runner": runners[0], "looks_ahead": looks_ahead, "rounds": rounds, "preempted": len(preempted)}


def _every_second(adapter: str | None, prompts: int) -> list[Any] | None:
    """Return what asks for an adapter, of each prompt; None where there is no adapter."""
    from vllm.lora.request import LoRARequest

    if adapter is None:
        return None
    return [LoRARequest("shifted", 1, adapter) if place % 2 else None for place in range(prompts)]


def _look_ahead() -> None:
    """Let an engine on a CPU schedule a step before it knows the tokens of the last one, as on a GPU."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def keep(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(keep)


def _refusal(make: Callable[..., Any], options: dict[str, Any]) -> str:
    """Return why an engine does not start: the errors, from the first to the last."""
    if options.get("async_scheduling"):
        _look_ahead()
    try:
        make(**options)
    except Exception:
        return traceback.format_exc()
    raise RuntimeError(f"an engine started with {options}")


def _count_preemptions() -> list[str]:
    """Return a list that grows by a request's name whenever the scheduler of this process preempts it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original, preempted = Scheduler._preempt_request, list[str]()

    @functools.wraps(original)
    def preempt(scheduler: Any, request: Any, *args: Any, **options: Any) -> Any:
        preempted.append(request.request_id)
        return original(scheduler, request, *args, **options)

    Scheduler._preempt_request = preempt
    return preempted


def _after_a_dummy_batch(engine: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a step before which every worker computes what an idle data-parallel rank does."""

    def run() -> Any:
        engine.collective_rpc("execute_dummy_batch")
        return step()

    return run


def _told(one: Any, completion: Any) -> dict[str, Any]:
    said = (one.kv_transfer_params or {}).get("spider_sense")
    tokens = list(completion.token_ids)
    logprobs = zip(completion.logprobs or (), tokens, strict=False)
    return {
        "prompt": list(one.prompt_token_ids),
        "prompt_logprobs": len(one.prompt_logprobs or ()),
        "tokens": tokens,
        "logprobs": [by_token[token].logprob for by_token, token in logprobs],
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "said": said.get("choices", [said])[completion.index] if said else None,
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
