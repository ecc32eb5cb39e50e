"""What starts a guarded server: the command of vLLM's, which is not imported, and what transformers' own has to be."""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.guard import Guard
from spider_sense.serving.seams import TESTED
from spider_sense.serving.settings import ENABLED, KEY, ServingSettings

__all__ = [
    "TESTED_TRANSFORMERS",
    "check_enabled",
    "check_installed",
    "check_transformers",
    "serve_command",
    "serve_environment",
    "transformers_options",
]

PLUGINS = "VLLM_PLUGINS"
"""Environment variable that names the plugins vLLM loads; unset, it loads all but those that add endpoints."""
GROUPS = ("vllm.general_plugins", "vllm.io_processor_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins")
"""Entry points that vLLM loads where nothing is named."""
TESTED_TRANSFORMERS = ("5.19.",)
"""Versions whose `transformers serve` the guard was tested in, by how they begin."""
ADDITIONAL, CONFIG = "--additional-config", "--config"
REVISIONS = ("--revision", "--code-revision", "--tokenizer-revision")


def check_installed() -> None:
    """Check that vLLM is there.

    Raises:
        ConfigError: if it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"vLLM is not installed beside spider-sense; it was tested with {TESTED[0]}x, "
            f"run: pip install 'vllm=={TESTED[0]}*'"
        )


def check_transformers() -> None:
    """Check that transformers' server is there, in a version that was tested.

    Raises:
        ConfigError: if it is another version: a seam that moved would leave requests unscored.
        MissingExtraError: if something that it needs is not installed.
    """
    from transformers import __version__

    if not __version__.startswith(TESTED_TRANSFORMERS):
        raise ConfigError(
            f"the server of transformers {__version__} was not tested with a guard, only that of "
            f"{', '.join(f'{one}x' for one in TESTED_TRANSFORMERS)}; run: pip install "
            f"'transformers=={TESTED_TRANSFORMERS[0]}*', or serve with vLLM"
        )
    for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "transformers-serve")


def check_enabled(given: Mapping[str, str], bare: str) -> None:
    """Check that the guard is not switched off.

    Args:
        given: the environment.
        bare: the command of a server without a guard.

    Raises:
        ConfigError: if it is.
    """
    if given.get(ENABLED, "1") == "0":
        raise ConfigError(f"{ENABLED}=0 switches the guard off; unset it, or start the server with `{bare}`")


def serve_command(
    source: str, folder: Path, guard: Guard, settings: ServingSettings, given: Sequence[str], additional: str | None
) -> list[str]:
    """Return the command.

    Unless told otherwise the model is served under the name that it was asked for by, in the dtype that the guard was
    calibrated in.

    Args:
        source: that name.
        folder: where the model lies.
        guard: the guard of ``settings``.
        settings: how the server is guarded.
        given: options of `vllm serve`.
        additional: the value of its option --additional-config, JSON.

    Raises:
        ConfigError: if the options hold another additional configuration, or that one is not an object or guarded, or
            they name a revision, which a folder has not.
    """
    told = _names(given) | _names_in_file(given)
    revisions = sorted(told.intersection(REVISIONS))
    if revisions:
        raise ConfigError(
            f"{', '.join(revisions)} would have no effect, since vLLM is given a folder; serve the folder of that one"
        )
    mine = {"--served-model-name": source}
    if guard.manifest.certified:
        mine["--dtype"] = guard.manifest.certified[0].dtype
    options = [part for name, value in mine.items() if name not in told for part in (name, value)]
    if any(name.startswith(ADDITIONAL) for name in told):
        raise ConfigError(f"give {ADDITIONAL} on the command line, as one JSON object, and in no other form")
    config = _additional(additional) | {KEY: settings.model_dump(mode="json", exclude_defaults=True)}
    options += [ADDITIONAL, json.dumps(config)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *given, *options]


def serve_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the server, in which the plugin is loaded beside whatever else would be.

    Raises:
        ConfigError: if the plugin is switched off there.
    """
    check_enabled(given, "vllm serve")
    if PLUGINS in given:
        named = given[PLUGINS].split(",")
    else:
        named = [entry.name for group in GROUPS for entry in entry_points(group=group)]
    return {**given, PLUGINS: ",".join(dict.fromkeys([*filter(None, named), KEY]))}


def transformers_options(guard: Guard, given: Sequence[str]) -> list[str]:
    """Return the options of `transformers serve`; unless they say otherwise the model runs as the guard was calibrated.

    Args:
        guard: in force.
        given: options of `transformers serve`.

    Raises:
        ConfigError: if they would let the server run past its guard.
    """
    past = sorted(_names(given).intersection(("--non-blocking", "--cb-use-cuda-graph")))
    if past:
        raise ConfigError(f"{', '.join(past)}: the server would run on without its guard; leave it out")
    certified = guard.manifest.certified
    mine = ["--dtype", certified[0].dtype] if certified and "--dtype" not in _names(given) else []
    return [*mine, *given]


def _names(given: Sequence[str]) -> set[str]:
    return {one.partition("=")[0].replace("_", "-") for one in given if one.startswith("--")}


def _names_in_file(given: Sequence[str]) -> set[str]:
    """Return the options that a file named by --config gives."""
    paths = [one.partition("=")[2] for one in given if one.startswith(f"{CONFIG}=")]
    paths += [given[place + 1] for place, one in enumerate(given[:-1]) if one == CONFIG]
    names: set[str] = set()
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path}: {error}; name a YAML file of vLLM's options") from error
        names |= _names([f"--{key}" for key in content or ()])
    return names


def _additional(given: str | None) -> dict[str, Any]:
    try:
        config = json.loads(given or "{}")
    except ValueError as error:
        raise ConfigError(f"{ADDITIONAL} {given!r} is not JSON: {error}; give one object") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{ADDITIONAL} {given!r} is not an object; give one, such as '{{}}'")
    if KEY in config:
        raise ConfigError(
            f"{ADDITIONAL} has the key {KEY!r} already; leave it out, the options of this command write it"
        )
    return config
