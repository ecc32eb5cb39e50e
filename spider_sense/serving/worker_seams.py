"""Only seams: where vLLM's workers and their two runners are taken hold of, in which a guard scores."""

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from spider_sense.audit import AuditLog
from spider_sense.errors import MismatchError, SpiderSenseError
from spider_sense.extraction.online import open_watch
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.lost_events import LostEvents
from spider_sense.serving import patch_seams
from spider_sense.serving.engine_config import serving_of, tokenizer_of
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.engine_step import Step
from spider_sense.serving.exchange import exchange
from spider_sense.serving.graph import graph_of
from spider_sense.serving.packed_rows import rows_of_batch, rows_of_runner
from spider_sense.serving.settings import ServingSettings, find_settings
from spider_sense.serving.taps import attach_taps
from spider_sense.serving.wrap import wrap

__all__ = ["install"]

_GUARD = "_spider_sense_guard"
"""Attribute of a runner: its :class:`EngineGuard`."""
_STEP = "_spider_sense_step"
"""Attribute of an output whose tokens are still on their way."""
Rows = Callable[[Any], tuple[Any, Any, Any]]


def install() -> None:
    """Take hold of vLLM's classes in this process."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner2
    from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner1
    from vllm.v1.worker.gpu_worker import Worker

    wrap(Worker, "load_model", _loaded)
    wrap(Worker, "determine_available_memory", _measured)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        wrap(CPUWorker, "determine_available_memory", _measured)
    wrap(Worker, "initialize_from_config", _sized)
    wrap(Worker, "compile_or_warm_up_model", _warmed)
    wrap(Worker, "shutdown", _shut_down)
    for runner, rows in ((Runner1, rows_of_runner), (Runner2, _rows_of_runner_2)):
        wrap(runner, "execute_model", functools.partial(_executed, rows))
        wrap(runner, "sample_tokens", _sampled)
    for pending in (AsyncGPUModelRunnerOutput, AsyncOutput):
        wrap(pending, "get_output", _got)
    Worker.spider_sense_exchange, Worker.spider_sense_restore = _exchanged, _restored


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
    guard = Guard.from_pretrained(settings.guard)
    graph = graph_of(guard, settings)
    if graph != settings.graph:
        raise MismatchError(
            f"this worker finds the probes and the patch {graph} where the server found {settings.graph}; let the "
            "files of guard, policy, patch and extraction be the same on every node, and leave them alone until it "
            "has started"
        )
    patch_seams.loaded(worker, settings)
    if worker.rank % config.parallel_config.tensor_parallel_size:
        return result
    watch = None if settings.extraction is None else open_watch(settings.load_extraction(), tokenizer_of(config))
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
        lost=LostEvents(),
    )
    attach_taps(worker.model_runner.get_model(), judge.bank)
    decode = tokenizer_of(config).decode if settings.audit is not None and settings.audit_text else None
    setattr(worker.model_runner, _GUARD, EngineGuard(judge, decode, config.model_config.max_model_len))
    return result


def _audit(settings: ServingSettings, rank: int) -> AuditLog | None:
    if settings.audit is None:
        return None
    path = settings.audit.with_name(f"{settings.audit.stem}-{rank}{settings.audit.suffix}") if rank else settings.audit
    return AuditLog(path, settings.audit_text)


def _measured(original: Callable[..., int], worker: Any) -> int:
    """Leave room beside the KV cache for what is known at the end of each of its blocks."""
    available = original()
    guard: EngineGuard | None = getattr(worker.model_runner, _GUARD, None)
    if guard is None or not worker.vllm_config.cache_config.enable_prefix_caching:
        return available
    specs = list(worker.get_kv_cache_spec().values())
    # Layers of one kind, at least, have their share in every block.
    fewest = min(Counter(type(spec) for spec in specs).values())
    block: int = fewest * min(spec.page_size_bytes for spec in specs)
    return available * block // (block + guard.kv_states.block_bytes)


def _sized(original: Callable[..., Any], worker: Any, kv_cache_config: Any) -> Any:
    result = original(kv_cache_config)
    guard = getattr(worker.model_runner, _GUARD, None)
    cache = worker.vllm_config.cache_config
    if guard is not None and cache.enable_prefix_caching:
        guard.kv_states.keep(cache.block_size, kv_cache_config.num_blocks)
    return result


def _warmed(original: Callable[..., Any], worker: Any) -> Any:
    guard: EngineGuard | None = getattr(worker.model_runner, _GUARD, None)
    with nullcontext() if guard is None else guard.warming():
        return original()


def _shut_down(original: Callable[..., Any], worker: Any) -> None:
    guard: EngineGuard | None = getattr(getattr(worker, "model_runner", None), _GUARD, None)
    try:
        if guard is not None:
            guard.close()
    finally:
        original()


def _exchanged(worker: Any, told: dict[str, Any]) -> str | None:
    guard: EngineGuard | None = getattr(worker.model_runner, _GUARD, None)
    return None if guard is None else exchange(guard, told, serving_of(worker.vllm_config))


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
