"""Every place where vLLM's engine is taken hold of. Nothing else in this package imports vLLM but ``front_seams`` and
``patch_seams``.

Tested with vLLM 0.32; another minor is refused, since a seam that moved would leave requests unscored.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spider_sense.audit import AuditLog
from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.extraction.online import open_watch, read_artifact
from spider_sense.fingerprint import ServingConfig
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.serving import front_seams, patch_seams
from spider_sense.serving.actor import ACTOR, Actor
from spider_sense.serving.checkpoint import checkpoint_fingerprint
from spider_sense.serving.checks import check_reasoning, check_settings, exchange, graph_of
from spider_sense.serving.choices import collected, gathered
from spider_sense.serving.core_seams import RUN, begun, canary_report, made, reloaded, run_core
from spider_sense.serving.engine_guard import EngineGuard, Step
from spider_sense.serving.packed_rows import rows_of_batch, rows_of_runner
from spider_sense.serving.prefix import keep_tail, tail_of
from spider_sense.serving.settings import KEY, ServingSettings, find_settings
from spider_sense.serving.streams import streamed_chat, streamed_completion
from spider_sense.serving.taps import attach_taps

__all__ = ["TESTED", "install"]

TESTED = ("0.32.",)
"""Versions of vLLM that the seams were tested with, by how they begin."""
_GUARD = "_spider_sense_guard"
_STEP = "_spider_sense_step"
_DONE = "_spider_sense_seam"
Rows = Callable[[Any], tuple[Any, Any, Any]]


def install() -> None:
    """Take hold of vLLM's classes in this process; a second call does nothing.

    Of a version that was not tested only the start is watched, to refuse it where a guard is named.
    """
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if not vllm.__version__.startswith(TESTED):
        # A server that names no guard is none of ours, whatever its version.
        _wrap(EngineArgs, "create_engine_config", functools.partial(_untested, vllm.__version__))
        return
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner2
    from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner1
    from vllm.v1.worker.gpu_worker import Worker

    _wrap(EngineArgs, "create_engine_config", _configured)
    _wrap(Worker, "load_model", _loaded)
    _wrap(Worker, "initialize_from_config", _sized)
    _wrap(Runner1, "execute_model", functools.partial(_executed, rows_of_runner))
    _wrap(Runner1, "sample_tokens", _sampled)
    _wrap(Runner2, "execute_model", functools.partial(_executed, _rows_of_runner_2))
    _wrap(Runner2, "sample_tokens", _sampled)
    for pending in (AsyncGPUModelRunnerOutput, AsyncOutput):
        _wrap(pending, "get_output", _got)
    _wrap(Scheduler, "__init__", _scheduling)
    _wrap(Scheduler, "update_from_output", _updated)
    _wrap(RequestState, "make_request_output", collected)
    _wrap(OpenAIServingChat, "chat_completion_stream_generator", streamed_chat)
    _wrap(OpenAIServingCompletion, "completion_stream_generator", streamed_completion)
    _wrap(OpenAIServingCompletion, "request_output_to_completion_response", gathered)
    _wrap(EngineCore, "__init__", made)
    for process in (EngineCoreProc, DPEngineCoreProc):
        _wrap(process, "run_busy_loop", begun)
    if not hasattr(EngineCoreProc, RUN):
        setattr(EngineCoreProc, RUN, EngineCoreProc.run_engine_core)
        EngineCoreProc.run_engine_core = run_core
    EngineCore.spider_sense_canaries = canary_report
    EngineCore.spider_sense_reload = functools.partialmethod(reloaded, _new_actor)
    Worker.spider_sense_exchange, Worker.spider_sense_restore = _exchanged, _restored
    front_seams.install(_wrap)
    patch_seams.install(_wrap)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put a function around a method of a class, or around a function of a module."""
    original = getattr(owner, name)
    if hasattr(original, _DONE):
        return

    bound = int(isinstance(owner, type))

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, *args[:bound]), *args, **kwargs)

    setattr(run, _DONE, True)
    setattr(owner, name, run)


def _configured(original: Callable[..., Any], args: Any, *rest: Any, **options: Any) -> Any:
    """Check the guard before anything is loaded, and put what of it is compiled into the configuration's hash."""
    settings = find_settings(args.additional_config)
    if settings is None:
        return original(*rest, **options)
    guard = check_settings(settings)
    front_seams.check(settings.load_policy(), *rest, **options)
    check_reasoning(settings.load_policy(), args.reasoning_parser)
    told = settings.model_copy(update={"guard": settings.guard.resolve(), "graph": graph_of(guard, settings)})
    args.additional_config = {**args.additional_config, KEY: told.model_dump(mode="json")}
    config = original(*rest, **options)
    _check_engine(config)
    _check_model(config, guard, settings)
    return config


def _untested(version: str, original: Callable[..., Any], args: Any, *rest: Any, **options: Any) -> Any:
    if find_settings(args.additional_config) is not None:
        raise ConfigError(
            f"vLLM {version} was not tested with this guard, only {', '.join(f'{one}x' for one in TESTED)}; "
            "install a tested version, or unset the guard"
        )
    return original(*rest, **options)


def _check_engine(config: Any) -> None:
    parallel = config.parallel_config
    unsupported = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "speculative_config with async scheduling": bool(
            config.speculative_config is not None and config.scheduler_config.async_scheduling
        ),
        "kv_transfer_config": config.kv_transfer_config is not None,
        "enable_lora": config.lora_config is not None,
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
        "enable_dbo": parallel.enable_dbo,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
        "enable_expert_parallel with tensor and data parallelism": parallel.use_sequence_parallel_moe,
        "enable_elastic_ep": parallel.enable_elastic_ep,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise ConfigError(f"a guard cannot see every token with {', '.join(found)}; serve without, or without a guard")


def _check_model(config: Any, guard: Guard, settings: ServingSettings) -> None:
    model = config.model_config
    found = checkpoint_fingerprint(Path(model.model), _tokenizer(config))
    guard.check_model(found, _serving(model), settings.allow_uncertified)
    if settings.extraction is not None:
        read_artifact(settings.load_extraction()).check_model(found)
    patched = patch_seams.find_patch(settings)
    if patched is not None:
        patched[0].check_model(found)


def _serving(model: Any) -> ServingConfig:
    dtype = str(model.dtype).removeprefix("torch.")
    return ServingConfig(dtype=dtype, quantization=model.quantization, adapters=())


def _tokenizer(config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config.model_config)


def _loaded(original: Callable[..., Any], worker: Any, *args: Any, **options: Any) -> Any:
    result = original(*args, **options)
    config = worker.vllm_config
    settings = find_settings(config.additional_config)
    if settings is None:
        return result
    if settings.graph is None:
        raise SpiderSenseError(
            "a guard is named, but this engine's configuration was made without the plugin, so that a graph compiled "
            "without the guard could be loaded; let VLLM_PLUGINS hold spider_sense in every process"
        )
    patch_seams.loaded(worker, settings)
    if worker.rank % config.parallel_config.tensor_parallel_size:
        return result
    guard = Guard.from_pretrained(settings.guard)
    watch = None if settings.extraction is None else open_watch(settings.load_extraction(), _tokenizer(config))
    judge = Judge(
        guard,
        settings.load_policy(),
        # Dense models forget their data-parallel rank, and keep it under this name.
        _audit(settings, config.parallel_config.data_parallel_index),
        worker.device,
        dtype=config.model_config.dtype,
        rows=config.scheduler_config.max_num_batched_tokens,
        exempt=settings.exempt_principals,
        watch=watch,
    )
    attach_taps(worker.model_runner.get_model(), judge.bank)
    decode = _tokenizer(config).decode if settings.audit is not None and settings.audit_text else None
    setattr(worker.model_runner, _GUARD, EngineGuard(judge, decode, config.model_config.max_model_len))
    return result


def _audit(settings: ServingSettings, rank: int) -> AuditLog | None:
    if settings.audit is None:
        return None
    path = settings.audit.with_name(f"{settings.audit.stem}-{rank}{settings.audit.suffix}") if rank else settings.audit
    return AuditLog(path, settings.audit_text)


def _sized(original: Callable[..., Any], worker: Any, kv_cache_config: Any) -> Any:
    result = original(kv_cache_config)
    guard = getattr(worker.model_runner, _GUARD, None)
    cache = worker.vllm_config.cache_config
    if guard is not None and cache.enable_prefix_caching:
        guard.keep_blocks(cache.block_size, kv_cache_config.num_blocks)
    return result


def _exchanged(worker: Any, told: dict[str, Any]) -> str | None:
    guard: EngineGuard | None = getattr(worker.model_runner, _GUARD, None)
    return None if guard is None else exchange(guard, told, _serving(worker.vllm_config.model_config))


def _restored(worker: Any) -> None:
    guard: EngineGuard | None = getattr(worker.model_runner, _GUARD, None)
    if guard is not None:
        guard.restore()


def _executed(rows: Rows, original: Callable[..., Any], runner: Any, step: Any, *args: Any, **options: Any) -> Any:
    if options.get("dummy_run"):
        return original(step, *args, **options)
    guard: EngineGuard | None = getattr(runner, _GUARD, None)
    if guard is not None:
        guard.begin(step)
    with patch_seams.patching(runner, step):
        output = original(step, *args, **options)
    if guard is not None and output is None and step.total_num_scheduled_tokens:
        guard.rows(*rows(runner))
    return output


def _rows_of_runner_2(runner: Any) -> tuple[Any, Any, Any]:
    return rows_of_batch(runner.execute_model_state.input_batch)


def _sampled(original: Callable[..., Any], runner: Any, *args: Any, **options: Any) -> Any:
    guard: EngineGuard | None = getattr(runner, _GUARD, None)
    if guard is None or not guard.waiting:
        return original(*args, **options)
    output = original(*args, **options)
    with torch.inference_mode():
        step = guard.fold()
    if hasattr(output, "get_output"):
        # The tokens are still on their way; whoever waits for them settles the step.
        setattr(output, _STEP, (guard, step))
        return output
    return _settled(guard, step, output)


def _got(original: Callable[..., Any], pending: Any) -> Any:
    output, known = original(), getattr(pending, _STEP, None)
    if known is None:
        return output
    guard, step = known
    return _settled(guard, step, output)


def _settled(guard: EngineGuard, step: Step, output: Any) -> Any:
    sampled = output.sampled_token_ids
    accepted = {name: sampled[place] for name, place in output.req_id_to_index.items() if sampled}
    with torch.inference_mode():
        output.spider_sense = guard.settle(step, accepted)
    return output


def _scheduling(original: Callable[..., Any], scheduler: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    settings = find_settings(scheduler.vllm_config.additional_config)
    if settings is None:
        return
    patch_seams.scheduling(scheduler, settings)
    tail = tail_of(Guard.from_pretrained(settings.guard))
    if tail:
        keep_tail(scheduler.kv_cache_manager, tail)


def _updated(original: Callable[..., Any], scheduler: Any, step: Any, output: Any) -> Any:
    actor = getattr(scheduler, ACTOR, None)
    if actor is None:
        settings = find_settings(scheduler.vllm_config.additional_config)
        actor = None if settings is None else _new_actor(scheduler, settings)
        setattr(scheduler, ACTOR, actor or False)
    return original(step, output) if not actor else actor.update(original, scheduler, step, output)


def _new_actor(scheduler: Any, settings: ServingSettings) -> Actor:
    tell = functools.partial(front_seams.send, scheduler.vllm_config.parallel_config._api_process_count)
    return Actor(settings, _refusal(scheduler, settings), _end, tell, patch_seams.switch_on)


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


def _refusal(scheduler: Any, settings: ServingSettings) -> Any:
    """Return the tokens of the refusal, and of the line break that sets it apart from an answer that has begun."""
    tokenizer = _tokenizer(scheduler.vllm_config)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end token, so a request cannot be stopped; give it one")
    text, line_break = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (settings.load_policy().refusal, "\n\n")
    )
    # Of an answer that was stopped vLLM takes the last token for the end token, and does not show it.
    return [*text, tokenizer.eos_token_id], line_break
