"""Only seams of vLLM's engine core: what a guard does while no request runs, at the start and on a reload."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spider_sense.canary import Canary, Drift
from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.serving.about import about
from spider_sense.serving.actor import ACTOR
from spider_sense.serving.canary import CanaryWatch, check_drift, report
from spider_sense.serving.letters import announce
from spider_sense.serving.origin import CANARY
from spider_sense.serving.settings import KEY, ServingSettings, find_settings
from spider_sense.types import Action

__all__ = ["RUN", "WAIT", "begun", "in_force", "made", "read_canaries", "reload_guard", "reloaded", "run_core"]

RUN = "_spider_sense_run_engine_core"
"""Attribute of an engine core's class that holds vLLM's own function in the place of :func:`run_core`."""
WAIT = 60.0
"""Seconds that a reload waits for the requests that run, unless it is told; nobody else is let in meanwhile."""
_SEVERAL = "a guard cannot be exchanged in several data-parallel engines at once; start them anew"
_SAID = "_spider_sense_said"
"""Attribute of an engine core: what is in force in it, as of ``about``, and how far its canaries drift."""
_SURE_FROM_THE_START: Mapping[Action, str] = {
    "throttle": "principals are told apart",
    "omit_reasoning": "reasoning is told from answers",
}
_NEW = 4
"""Tokens that a canary generates: decoding may run another graph than prompts do."""


def made(original: Callable[..., Any], core: Any, *args: Any, **options: Any) -> None:
    """Make an engine that shows that it scores as the guard was calibrated.

    Raises:
        MismatchError: if it does not score so.
    """
    original(*args, **options)
    _start(core)


def begun(original: Callable[..., Any], core: Any) -> None:
    """Do the same before the first request, for an engine that was made without :func:`run_core`, as Ray makes it."""
    _start(core)
    original()


def run_core(*args: Any, **options: Any) -> None:
    """Be the process of an engine core, with the plugin loaded; vLLM loads it while the core is made: after `made`."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.core import EngineCoreProc

    load_general_plugins()
    getattr(EngineCoreProc, RUN, EngineCoreProc.run_engine_core)(*args, **options)


def _start(core: Any) -> None:
    settings = find_settings(core.vllm_config.additional_config)
    if settings is not None and not hasattr(core, _SAID):
        if not hasattr(core.scheduler, ACTOR):
            raise ConfigError(
                f"nothing of a guard acts in the scheduler {type(core.scheduler).__qualname__}; serve without "
                "--scheduler-cls, with a subclass of vLLM's Scheduler, or without a guard"
            )
        said = _said(settings)
        setattr(core, _SAID, {**said, "canaries": report(_try_canaries(core, settings))})


def _said(settings: ServingSettings) -> dict[str, Any]:
    import vllm

    versions = {"spider_sense": version("spider-sense"), "vllm": vllm.__version__}
    return about(Guard.from_pretrained(settings.guard), settings.load_policy(), settings, versions)


def in_force(core: Any) -> Mapping[str, Any] | None:
    """Return what ``GET /v1/guard`` says, None without a guard; a utility of the engine core."""
    said: Mapping[str, Any] | None = getattr(core, _SAID, None)
    return said


async def read_canaries(engine: Any) -> Mapping[str, Any] | None:
    """Ask an ``AsyncLLM`` how far its canaries drift; where there are several engines, the first of them.

    Returns:
        As of :func:`spider_sense.serving.canary.report`; None of a guard without canaries.
    """
    said = await engine.engine_core.call_utility_async("spider_sense_about")
    found: Mapping[str, Any] | None = said and said["canaries"]
    return found


def reloaded(core: Any, new_actor: Callable[[Any, ServingSettings], Any], guard: str, policy: str | None) -> Any:
    """Exchange the guard of a paused engine; a utility of the engine core.

    Args:
        core: the engine.
        new_actor: makes the actor of a scheduler.
        guard: folder of the new guard, of the same model, sites and columns.
        policy: its policy; None for the file of before, which is read anew.

    Returns:
        ``refused``, why the engine goes on with the guard of before, or else ``canaries``, as of
        :func:`read_canaries`.
    """
    settings = find_settings(core.vllm_config.additional_config)
    try:
        wanted = _wanted(core, settings, guard, policy)
        actor = new_actor(core.scheduler, wanted)
        said = _said(wanted)
        said["canaries"] = report(_exchange(core, wanted))
    except SpiderSenseError as error:
        return {"refused": str(error)}
    except BaseException:
        _give_up(core)
        raise
    core.vllm_config.additional_config[KEY] = wanted.model_dump(mode="json")
    setattr(core.scheduler, ACTOR, actor)
    setattr(core, _SAID, said)
    announce(core, said)
    return {"canaries": said["canaries"]}


async def reload_guard(
    engine: Any, guard: Path, policy: Path | None = None, wait_seconds: float = WAIT
) -> Mapping[str, Any] | None:
    """Exchange the guard of an ``AsyncLLM`` while it serves.

    Requests that run end under the guard of before, those that come meanwhile wait; the KV cache is emptied.

    Args:
        engine: of one engine core.
        guard: folder of the new guard, of the same model, sites and columns.
        policy: its policy; by default the file of before, read anew.
        wait_seconds: how long it waits for the requests that run to end.

    Returns:
        As of :func:`read_canaries`.

    Raises:
        ConfigError: if there are several engine cores (data parallelism).
        MismatchError: if the engine refuses the guard; it goes on with that of before.
        SpiderSenseError: if the engine is paused already, or requests still run when the wait is over.
    """
    # Each of several engines believes that it is the only one.
    if engine.vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigError(_SEVERAL)
    if await engine.is_paused():
        raise SpiderSenseError("the engine is paused; resume it, and reload the guard then")
    try:
        await _pause(engine, wait_seconds)
        paths = [None if path is None else str(path.resolve()) for path in (guard, policy)]
        result = await engine.engine_core.call_utility_async("spider_sense_reload", *paths)
    finally:
        await engine.resume_generation()
    if "refused" in result:
        raise MismatchError(f"{result['refused']}. The engine goes on with the guard of before")
    found: Mapping[str, Any] | None = result["canaries"]
    return found


async def _pause(engine: Any, wait_seconds: float) -> None:
    try:
        await asyncio.wait_for(engine.pause_generation(mode="wait", clear_cache=True), wait_seconds)
    except TimeoutError as error:
        raise SpiderSenseError(
            f"requests still run: they did not end within {wait_seconds:g} seconds, in which nobody else was let in. "
            "The engine goes on with the guard of before; try again when fewer run, or with a larger wait_seconds"
        ) from error


def _wanted(core: Any, settings: ServingSettings | None, guard: str, policy: str | None) -> ServingSettings:
    if settings is None:
        raise ConfigError("this engine runs without a guard, and its graph has no room for one; start anew with it")
    if core.vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigError(_SEVERAL)
    if not core.is_scheduler_paused() or core.scheduler.running:
        raise ConfigError("requests run; pause the engine with mode 'wait' first")
    changes = {"guard": Path(guard)} | ({} if policy is None else {"policy": Path(policy)})
    wanted = settings.model_copy(update=changes)
    actions, before = wanted.load_policy().actions, getattr(core, _SAID)["policy"]["actions"]
    for action, sure in _SURE_FROM_THE_START.items():
        if action in actions and action not in before:
            raise ConfigError(
                f"the policy says {action}, and that of before did not, so nobody made sure that {sure}; "
                "start anew with this policy"
            )
    return wanted


def _give_up(core: Any) -> None:
    """End an engine of which nobody knows which guard it has, as vLLM does when a step fails."""
    from vllm.v1.engine import EngineCoreRequestType

    core.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))


def _exchange(core: Any, wanted: ServingSettings) -> Drift | None:
    """Exchange the guard in the workers, and let it stand only if its canaries do."""
    refusals = core.collective_rpc("spider_sense_exchange", args=(wanted.model_dump(mode="json"),))
    refused = next(filter(None, refusals), None)
    if refused is not None:
        raise MismatchError(refused)
    try:
        return _try_canaries(core, wanted)
    except SpiderSenseError:
        core.collective_rpc("spider_sense_restore")
        raise


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
    longest = max(len(canary.tokens) for canary in manifest.canaries.prompts) + _NEW
    if longest > core.vllm_config.model_config.max_model_len:
        raise ConfigError(f"the guard's canaries need {longest} tokens; serve with a --max-model-len of at least that")
    watch = CanaryWatch(manifest.canaries)
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
    drift = watch.drift(tuple(detector.name for detector in manifest.detectors))
    check_drift(drift, manifest, settings.allow_uncertified)
    logger.info("the guard's canaries: %s", drift)
    return drift


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
