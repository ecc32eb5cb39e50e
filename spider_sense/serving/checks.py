"""What is asked of a guard before an engine starts with it, or exchanges it for that of before."""

from collections.abc import Mapping
from typing import Any

from spider_sense.config import parse
from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.extraction.online import heads_of, read_artifact
from spider_sense.fingerprint import ServingConfig
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.scoring import SiteMap
from spider_sense.serving import patch_seams
from spider_sense.serving.engine_config import check_guard
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.prefix import reads_prompts_alone, tail_of
from spider_sense.serving.settings import ServingSettings
from spider_sense.types import Action, Site

__all__ = ["OP_VERSION", "check_reasoning", "check_settings", "exchange", "graph_of"]

CAN: tuple[Action, ...] = ("observe", "flag", "throttle", "omit_reasoning", "verify", "escalate", "patch", "stop")
"""Actions that can be carried out; flag, verify and escalate stand in the answer and in the audit log."""
OP_VERSION = 3
"""Raised whenever what is compiled into the model's graph changes."""


def check_settings(settings: ServingSettings) -> Guard:
    """Return the guard of some settings, once it and the policy have been read.

    Raises:
        SpiderSenseError: if one of them is damaged, or the policy asks for what cannot be done here.
    """
    guard = Guard.from_pretrained(settings.guard)
    names = [detector.name for detector in guard.manifest.detectors]
    policy = settings.load_policy()
    policy.check_engine("the vLLM engine", CAN, names)
    policy.check_watched(settings.extraction is not None)
    return guard


def check_reasoning(policy: Policy, parser: str | None) -> None:
    """Check that reasoning can be told from an answer if it may have to be left out.

    Args:
        policy: in force.
        parser: name of vLLM's reasoning parser.

    Raises:
        ConfigError: if it cannot.
    """
    if "omit_reasoning" in policy.actions and not parser:
        raise ConfigError(
            "the policy's action 'omit_reasoning' needs to know what of an answer is reasoning; name a "
            "--reasoning-parser for this model, or take the action out of the policy"
        )


def graph_of(guard: Guard, settings: ServingSettings) -> str:
    """Return what of a guard, of whoever watches for extraction and of the policy's patch the model's graph holds."""
    heads = () if settings.extraction is None else heads_of(read_artifact(settings.load_extraction()))
    probes = [f"{probe.name}:{'+'.join(map(_taps, probe.maps.items()))}" for probe in (*guard.probes, *heads)]
    return f"{OP_VERSION}/{'/'.join(probes)}{patch_seams.graph_of(settings)}"


def _taps(item: tuple[Site, SiteMap]) -> str:
    """Return a site, and how many columns its products write: they decide which op is compiled, and what it writes."""
    site, one = item
    weights = [one.weight] if one.mlp_weight is None else [one.weight, one.mlp_weight]
    return "*".join([str(site), *(str(weight.shape[1]) for weight in weights)])


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
        graph = graph_of(guard, settings)
        if graph != settings.graph:
            raise MismatchError(
                f"the model was compiled with the probes {settings.graph}, the guard has {graph}; "
                "start anew with this guard"
            )
        if tail_of(guard) > tail_of(running.judge.guard):
            raise MismatchError(
                "the guard has probes that read the template's tail alone, and that of before has none, so that hits "
                "of the prefix cache may lie in it; start anew with this guard"
            )
        if reads_prompts_alone(guard) and not reads_prompts_alone(running.judge.guard):
            raise MismatchError(
                "the guard has probes that read prompts alone, and that of before has none, so that hits of the prefix "
                "cache may hold answers; start anew with this guard"
            )
        check_guard(guard, running.judge.guard.manifest.fingerprint, serving, settings.allow_uncertified)
        running.exchange(guard, policy)
    except SpiderSenseError as error:
        return str(error)
    return None
