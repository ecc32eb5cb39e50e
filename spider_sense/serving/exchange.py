"""Another guard for an engine that runs: taken from its folder if the engine's graph and prefix cache allow it."""

from collections.abc import Mapping
from typing import Any

from spider_sense.config import parse
from spider_sense.errors import MismatchError, SpiderSenseError
from spider_sense.fingerprint import ServingConfig
from spider_sense.guard import Guard
from spider_sense.serving.checks import check_settings
from spider_sense.serving.engine_config import check_guard
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.graph import graph_of
from spider_sense.serving.prefix import reads_prompts_alone, tail_of
from spider_sense.serving.settings import ServingSettings

__all__ = ["exchange"]


def exchange(running: EngineGuard, told: Mapping[str, Any], serving: ServingConfig) -> str | None:
    """Let an engine go on with the guard that settings name.

    Args:
        running: with the guard of before.
        told: the settings.
        serving: how the engine runs the model.

    Returns:
        Why it goes on with that of before, None if it does not. A worker in another process would lose the type of an
        error.
    """
    try:
        settings = parse(told, ServingSettings, origin="the settings to reload")
        guard = check_settings(settings)
        policy = settings.load_policy()
        _check_graph(guard, settings)
        before = running.judge.guard
        _check_hits(guard, before)
        check_guard(guard, before.manifest.fingerprint, serving, settings.allow_uncertified)
        running.exchange(guard, policy)
    except SpiderSenseError as error:
        return str(error)
    return None


def _check_graph(guard: Guard, settings: ServingSettings) -> None:
    graph = graph_of(guard, settings)
    if graph != settings.graph:
        raise MismatchError(
            f"the model was compiled with the probes {settings.graph}, the guard has {graph}; "
            "start anew with this guard"
        )


def _check_hits(guard: Guard, before: Guard) -> None:
    """Check that hits of the prefix cache, as they are limited for one guard, suit another."""
    if tail_of(guard) > tail_of(before):
        raise MismatchError(
            "the guard has probes that read the template's tail alone, and that of before has none, so that hits "
            "of the prefix cache may lie in it; start anew with this guard"
        )
    if reads_prompts_alone(guard) and not reads_prompts_alone(before):
        raise MismatchError(
            "the guard has probes that read prompts alone, and that of before has none, so that hits of the prefix "
            "cache may hold answers; start anew with this guard"
        )
