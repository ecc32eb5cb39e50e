"""Only seams: how the guard of an engine of vLLM is exchanged while it serves."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spider_sense.canary import Drift
from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.serving.actor import ACTOR
from spider_sense.serving.canary import report
from spider_sense.serving.canary_seams import try_canaries
from spider_sense.serving.core_seams import SAID, said_of
from spider_sense.serving.letters import announce
from spider_sense.serving.settings import KEY, ServingSettings, find_settings
from spider_sense.types import Action

__all__ = ["WAIT", "reload_guard", "reloaded"]

WAIT = 60.0
"""Seconds that a reload waits for the requests that run, unless it is told; nobody else is let in meanwhile."""
_SEVERAL = "a guard cannot be exchanged in several data-parallel engines at once; start them anew"
_SURE_FROM_THE_START: Mapping[Action, str] = {
    "throttle": "principals are told apart",
    "omit_reasoning": "reasoning is told from answers",
}


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
        As of :func:`spider_sense.serving.canary.report`.

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


def reloaded(core: Any, new_actor: Callable[[Any, ServingSettings], Any], guard: str, policy: str | None) -> Any:
    """Exchange the guard of a paused engine; a utility of the engine core.

    Args:
        core: the engine.
        new_actor: makes the actor of a scheduler.
        guard: folder of the new guard, of the same model, sites and columns.
        policy: its policy; None for the file of before, which is read anew.

    Returns:
        ``refused``, why the engine goes on with the guard of before, or else ``canaries``, as of
        :func:`spider_sense.serving.canary.report`.
    """
    settings = find_settings(core.vllm_config.additional_config)
    try:
        wanted = _wanted(core, settings, guard, policy)
        actor = new_actor(core.scheduler, wanted)
        said = said_of(wanted)
        said["canaries"] = report(_exchange(core, wanted))
    except SpiderSenseError as error:
        return {"refused": str(error)}
    except BaseException:
        _give_up(core)
        raise
    core.vllm_config.additional_config[KEY] = wanted.model_dump(mode="json")
    setattr(core.scheduler, ACTOR, actor)
    setattr(core, SAID, said)
    announce(core, said)
    return {"canaries": said["canaries"]}


def _wanted(core: Any, settings: ServingSettings | None, guard: str, policy: str | None) -> ServingSettings:
    if settings is None:
        raise ConfigError("this engine runs without a guard, and its graph has no room for one; start anew with it")
    if core.vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigError(_SEVERAL)
    if not core.is_scheduler_paused() or core.scheduler.running:
        raise ConfigError("requests run; pause the engine with mode 'wait' first")
    changes = {"guard": Path(guard)} | ({} if policy is None else {"policy": Path(policy)})
    wanted = settings.model_copy(update=changes)
    actions, before = wanted.load_policy().actions, getattr(core, SAID)["policy"]["actions"]
    for action, sure in _SURE_FROM_THE_START.items():
        if action in actions and action not in before:
            raise ConfigError(
                f"the policy says {action}, and that of before did not, so nobody made sure that {sure}; "
                "start anew with this policy"
            )
    return wanted


def _exchange(core: Any, wanted: ServingSettings) -> Drift | None:
    """Exchange the guard in the workers, and let it stand only if its canaries do."""
    refusals = core.collective_rpc("spider_sense_exchange", args=(wanted.model_dump(mode="json"),))
    refused = next(filter(None, refusals), None)
    if refused is not None:
        raise MismatchError(refused)
    try:
        return try_canaries(core, wanted)
    except SpiderSenseError:
        core.collective_rpc("spider_sense_restore")
        raise


def _give_up(core: Any) -> None:
    """End an engine of which nobody knows which guard it has, as vLLM does when a step fails."""
    from vllm.v1.engine import EngineCoreRequestType

    core.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))
