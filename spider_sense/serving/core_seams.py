"""Only seams of vLLM's engine core: what a guard does between the start of an engine and its first request."""

from collections.abc import Callable, Mapping
from typing import Any

from spider_sense.canary import Canary, Drift
from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.serving.actor import ACTOR
from spider_sense.serving.canary import CanaryWatch, check_drift, report
from spider_sense.serving.settings import ServingSettings, find_settings

__all__ = ["begun", "canary_report", "made", "read_canaries"]

_DRIFT = "_spider_sense_drift"


def made(original: Callable[..., Any], core: Any, *args: Any, **options: Any) -> None:
    """Make an engine that shows that it scores as the guard was calibrated.

    An engine in a process of its own loads plugins while it is being made; it gets as far as :func:`begun`.

    Raises:
        MismatchError: if it does not score so.
    """
    original(*args, **options)
    _start(core)


def begun(original: Callable[..., Any], core: Any) -> None:
    """Do the same before an engine takes the first request from its queue; whoever waits for it to start waits on."""
    _start(core)
    original()


def _start(core: Any) -> None:
    settings = find_settings(core.vllm_config.additional_config)
    if settings is not None and not hasattr(core, _DRIFT):
        setattr(core, _DRIFT, _try_canaries(core, settings))


def canary_report(core: Any) -> Mapping[str, Any] | None:
    """Return how far the canaries have drifted, None of a guard without any; a utility of the engine core."""
    drift: Drift | None = getattr(core, _DRIFT, None)
    return report(drift)


async def read_canaries(engine: Any) -> Mapping[str, Any] | None:
    """Ask an ``AsyncLLM`` for :func:`canary_report`; where there are several engines, the first of them."""
    found: Mapping[str, Any] | None = await engine.engine_core.call_utility_async("spider_sense_canaries")
    return found


def _try_canaries(core: Any, settings: ServingSettings) -> Drift | None:
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
    longest = max(len(canary.tokens) for canary in manifest.canaries.prompts)
    if longest >= core.vllm_config.model_config.max_model_len:
        raise ConfigError(f"the guard's canaries have up to {longest} tokens; serve with a --max-model-len above that")
    watch = CanaryWatch(manifest.canaries)
    _replay(core, watch, manifest.canaries.prompts)
    drift = watch.drift(tuple(detector.name for detector in manifest.detectors))
    check_drift(drift, manifest, settings.allow_uncertified)
    logger.info("the guard's canaries: %s", drift)
    return drift


def _replay(core: Any, watch: CanaryWatch, canaries: tuple[Canary, ...]) -> None:
    """Run canaries through an idle engine and leave no trace of them: neither outputs, nor statistics, nor KV blocks.

    The loop is that of the engine's own process, except that nobody is sent what comes out.
    """
    scheduler = core.scheduler
    acting = getattr(scheduler, ACTOR, None)
    setattr(scheduler, ACTOR, watch)
    try:
        for name, canary in zip(watch.names, canaries, strict=True):
            scheduler.add_request(_request(name, canary, core.request_block_hasher))
        while scheduler.has_requests() or core.batch_queue:
            _, executed = core.step_fn()
            core.post_step(executed)
    finally:
        setattr(scheduler, ACTOR, acting)
    core.reset_prefix_cache()


def _request(name: str, canary: Canary, block_hasher: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    # A prompt in the cache is neither computed nor, since it was not looked up, counted.
    sampling = SamplingParams(temperature=0.0, max_tokens=1, skip_reading_prefix_cache=True)
    return Request(name, list(canary.tokens), sampling, None, block_hasher=block_hasher)
