"""What is asked of a guard before an engine starts with it, or exchanges it for that of before."""

from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.serving.settings import ServingSettings
from spider_sense.types import Action

__all__ = ["check_reasoning", "check_settings"]

CAN: tuple[Action, ...] = ("observe", "flag", "throttle", "omit_reasoning", "verify", "escalate", "patch", "stop")
"""Actions that can be carried out; flag, verify and escalate stand in the answer and in the audit log."""


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
