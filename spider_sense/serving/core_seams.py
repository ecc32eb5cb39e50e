"""Only seams of vLLM's engine core: where it starts under a guard, and says what is in force."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.serving.about import about
from spider_sense.serving.actor import ACTOR
from spider_sense.serving.canary import report
from spider_sense.serving.canary_seams import try_canaries
from spider_sense.serving.settings import ServingSettings, find_settings

__all__ = ["RUN", "SAID", "begun", "in_force", "made", "run_core", "said_of"]

RUN = "_spider_sense_run_engine_core"
"""Attribute of an engine core's class that holds vLLM's own function in the place of :func:`run_core`."""
SAID = "_spider_sense_said"
"""Attribute of an engine core: what is in force in it, as of ``about``, and how far its canaries drift."""


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
    if settings is not None and not hasattr(core, SAID):
        if not hasattr(core.scheduler, ACTOR):
            raise ConfigError(
                f"nothing of a guard acts in the scheduler {type(core.scheduler).__qualname__}; serve without "
                "--scheduler-cls, with a subclass of vLLM's Scheduler, or without a guard"
            )
        said = said_of(settings)
        setattr(core, SAID, {**said, "canaries": report(try_canaries(core, settings))})


def in_force(core: Any) -> Mapping[str, Any] | None:
    """Return what ``GET /v1/guard`` says, None without a guard; a utility of the engine core."""
    said: Mapping[str, Any] | None = getattr(core, SAID, None)
    return said


def said_of(settings: ServingSettings) -> dict[str, Any]:
    """Return what is in force under some settings, as of :func:`spider_sense.serving.about.about`."""
    import vllm

    versions = {"spider_sense": version("spider-sense"), "vllm": vllm.__version__}
    return about(Guard.from_pretrained(settings.guard), settings.load_policy(), settings, versions)
