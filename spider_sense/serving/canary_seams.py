"""Only seams: how an engine of vLLM replays a guard's canaries while no request runs, at the start and on a reload."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spider_sense.canary import Canaries, Canary, Drift
from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.serving.actor import ACTOR
from spider_sense.serving.canary import CanaryWatch, check_drift
from spider_sense.serving.origin import CANARY
from spider_sense.serving.settings import ServingSettings

__all__ = ["read_canaries", "try_canaries"]

_NEW = 4
"""Tokens that a canary generates: decoding may run another graph than prompts do."""


async def read_canaries(engine: Any) -> Mapping[str, Any] | None:
    """Ask an ``AsyncLLM`` how far its canaries drift; where there are several engines, the first of them.

    Returns:
        As of :func:`spider_sense.serving.canary.report`; None of a guard without canaries.
    """
    said = await engine.engine_core.call_utility_async("spider_sense_about")
    found: Mapping[str, Any] | None = said and said["canaries"]
    return found


def try_canaries(core: Any, settings: ServingSettings) -> Drift | None:
    """Run the guard's canaries through an idle engine and compare their scores; None of a guard without them.

    Raises:
        ConfigError: if the engine is too small for them, or its audit log does not take them.
        MismatchError: if the engine does not score as the guard was calibrated.
        RuntimeError: if the engine failed meanwhile.
    """
    from vllm.logger import init_logger

    logger = init_logger("vllm.spider_sense")
    manifest = Guard.from_pretrained(settings.guard).manifest
    if manifest.canaries is None:
        logger.warning(
            "the guard %s has no canaries, so it cannot be told whether this engine scores as it was calibrated; "
            "`spider-sense calibrate` gives it some",
            settings.guard,
        )
        return None
    drift = _watched(core, manifest.canaries).drift(tuple(detector.name for detector in manifest.detectors))
    check_drift(drift, manifest, settings.allow_uncertified)
    logger.info("the guard's canaries: %s", drift)
    return drift


def _watched(core: Any, canaries: Canaries) -> CanaryWatch:
    """Return what an engine made of canaries."""
    longest = max(len(canary.tokens) for canary in canaries.prompts) + _NEW
    if longest > core.vllm_config.model_config.max_model_len:
        raise ConfigError(f"the guard's canaries need {longest} tokens; serve with a --max-model-len of at least that")
    watch = CanaryWatch(canaries)
    try:
        _replay(core, watch)
    except Exception as error:
        # Whatever it is, requests may be left behind in the engine, so it is no refusal after which one goes on.
        raise RuntimeError(f"the engine failed while it replayed the guard's canaries: {error}") from error
    if watch.unrecorded:
        raise ConfigError(
            f"the audit log did not take {watch.unrecorded} events of the guard's canaries; the worker's log says why: "
            "let it have room on its disk"
        )
    return watch


def _replay(core: Any, watch: CanaryWatch) -> None:
    """Run canaries through an idle engine and leave no trace of them: neither outputs, nor statistics, nor KV blocks.

    The loop is that of the engine's own process, except that nobody is sent what comes out.
    """
    scheduler = core.scheduler
    acting = getattr(scheduler, ACTOR, None)
    setattr(scheduler, ACTOR, watch)
    try:
        with _alone(scheduler):
            for name, canary in watch.requests.items():
                scheduler.add_request(_request(name, canary, core.request_block_hasher))
            while scheduler.has_requests() or core.batch_queue:
                _, executed = core.step_fn()
                core.post_step(executed)
    finally:
        setattr(scheduler, ACTOR, acting)
    core.reset_prefix_cache()


@contextmanager
def _alone(scheduler: Any) -> Iterator[None]:
    """Let an idle scheduler, even a paused one, run what is added now and nothing that waits already."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.request_queue import create_request_queue

    waiting, paused = scheduler.waiting, scheduler.pause_state
    scheduler.waiting = create_request_queue(scheduler.policy)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    try:
        yield
    finally:
        scheduler.set_pause_state(paused)
        # A client may have left meanwhile; the queue that the scheduler took its request out of was not this one.
        waiting.remove_requests([request for request in waiting if request.is_finished()])
        scheduler.waiting = waiting


def _request(name: str, canary: Canary, block_hasher: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    # A prompt in the cache is neither computed nor, since it was not looked up, counted.
    sampling = SamplingParams(
        temperature=0.0, max_tokens=_NEW, ignore_eos=True, skip_reading_prefix_cache=True, extra_args=dict(CANARY)
    )
    return Request(name, list(canary.tokens), sampling, None, block_hasher=block_hasher)
