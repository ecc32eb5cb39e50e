"""Only seams: where vLLM's scheduler is taken hold of, in which requests are stopped and answers get their verdicts."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.serving import letters, patch_seams
from spider_sense.serving.actor import ACTOR, Actor
from spider_sense.serving.block_keys import keep_answers_apart
from spider_sense.serving.engine_config import check_order, tokenizer_of
from spider_sense.serving.prefix import keep_tail, reads_prompts_alone, tail_of
from spider_sense.serving.settings import ServingSettings, find_settings
from spider_sense.serving.wrap import wrap

__all__ = ["install", "new_actor"]


def install() -> None:
    """Take hold of vLLM's classes in this process."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "__init__", _scheduling)
    wrap(Scheduler, "update_from_output", _updated)


def _scheduling(original: Callable[..., Any], scheduler: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    settings = find_settings(scheduler.vllm_config.additional_config)
    if settings is None:
        return
    _check_own(type(scheduler))
    patch_seams.scheduling(scheduler, settings)
    setattr(scheduler, ACTOR, new_actor(scheduler, settings))
    guard = Guard.from_pretrained(settings.guard)
    tail = tail_of(guard)
    if tail:
        keep_tail(scheduler.kv_cache_manager, tail)
    if reads_prompts_alone(guard):
        keep_answers_apart(scheduler)


def _check_own(kind: type[Any]) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    if kind.update_from_output is not Scheduler.update_from_output:
        raise ConfigError(
            f"the scheduler {kind.__module__}.{kind.__qualname__} takes in tokens by an update_from_output of its own, "
            "where nothing of a guard acts: serve without --scheduler-cls, with one that leaves that method to vLLM's "
            "Scheduler, or without a guard"
        )


def _updated(original: Callable[..., Any], scheduler: Any, step: Any, output: Any) -> Any:
    actor = getattr(scheduler, ACTOR, None)
    return original(step, output) if actor is None else actor.update(original, scheduler, step, output)


def new_actor(scheduler: Any, settings: ServingSettings) -> Actor:
    """Return what acts in a scheduler under some settings.

    Raises:
        ConfigError: if it cannot do what the policy asks for.
    """
    policy = settings.load_policy()
    check_order(scheduler.vllm_config, policy)
    patch_seams.check_preemption(scheduler, policy)
    return Actor(
        settings,
        _refusal(scheduler, policy.refusal),
        _end,
        functools.partial(letters.send, scheduler.vllm_config.parallel_config._api_process_count),
        functools.partial(patch_seams.switch_on, again=policy.reads_again),
        patch_seams.read_again if policy.reads_again else None,
    )


def _end(scheduler: Any, outputs: dict[int, Any], name: str, tokens: list[int], reason: str) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    request = scheduler.requests[name]
    prefill = request.take_prefill_stats()
    if prefill is not None:
        prefill.finalize(scheduler.kv_cache_manager.estimate_cached_tokens(request))
    scheduler.finish_requests(name, RequestStatus.FINISHED_STOPPED)
    last = EngineCoreOutput(
        request_id=name,
        new_token_ids=tokens,
        finish_reason=request.get_finished_reason(),
        stop_reason=reason,
        events=request.take_events(),
        prefill_stats=prefill,
        new_logprobs=_certain(tokens, request.sampling_params),
        trace_headers=request.trace_headers,
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(last)


def _certain(tokens: list[int], sampling: Any) -> Any:
    """Return log-probabilities as a client asked for them, of tokens that were not sampled: each was certain."""
    from vllm.v1.outputs import LogprobsLists

    if sampling is None or sampling.num_logprobs is None:
        return None
    shape = (len(tokens), 1)
    ids = np.array(tokens, dtype=np.int32).reshape(shape)
    return LogprobsLists(ids, np.zeros(shape, np.float32), np.zeros(len(tokens), np.int32))


def _refusal(scheduler: Any, refusal: str) -> Any:
    """Return the tokens of the refusal, and of the line break that sets it apart from an answer that has begun."""
    tokenizer = tokenizer_of(scheduler.vllm_config)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end token, so a request cannot be stopped; give it one")
    text, line_break = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (refusal, "\n\n"))
    # Of an answer that was stopped vLLM takes the last token for the end token, and does not show it.
    return [*text, tokenizer.eos_token_id], line_break
