"""``spider-sense serve``."""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spider_sense.cli.app import app
from spider_sense.errors import ConfigError, nearest

if TYPE_CHECKING:
    from spider_sense.serving.settings import ServingSettings

__all__ = ["serve"]

ENGINES = ("transformers", "vllm")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id or .gguf file; smollm2 is the packaged model.")],
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    engine: Annotated[str, typer.Option(help="What serves: vllm or transformers.")] = "vllm",
    policy: Annotated[Path | None, typer.Option(help="Policy YAML; by default breaches are stopped.")] = None,
    audit: Annotated[Path | None, typer.Option(help="Append events to this JSON-lines file.")] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="Record prompts too.")] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Show clients scores, which they can climb.")] = False,
    allow_uncertified: Annotated[
        bool, typer.Option("--allow-uncertified", help="Accept a dtype, quantisation or LoRA not calibrated for.")
    ] = False,
    principal_header: Annotated[
        str | None, typer.Option(help="Header, set by your proxy, that names who sends a request.")
    ] = None,
    extraction: Annotated[Path | None, typer.Option(help="YAML file that says how to watch for extraction.")] = None,
    exempt_principals: Annotated[
        list[str] | None, typer.Option(help="Never act on the requests of this principal; repeat for others.")
    ] = None,
    additional_config: Annotated[
        str | None, typer.Option("--additional-config", "--additional_config", help="vLLM's, a JSON object.")
    ] = None,
) -> None:
    """Serve a model under a guard; after the model come any options of `vllm serve`, or of `transformers serve`."""
    from spider_sense.config import parse
    from spider_sense.serving.settings import ServingSettings

    if model.startswith("-"):
        raise ConfigError(f"{model} stands where the model is expected; name the model first")
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; {nearest(engine, ENGINES)}")
    told = {
        "guard": guard,
        "policy": policy,
        "audit": audit,
        "audit_text": audit_text,
        "scores": scores,
        "allow_uncertified": allow_uncertified,
        "principal_header": principal_header,
        "extraction": extraction,
        "exempt_principals": exempt_principals or (),
    }
    settings = parse(told, ServingSettings, origin="the options")
    if engine == "transformers":
        if additional_config is not None:
            raise ConfigError("--additional-config is an option of vLLM's; leave it out")
        _with_transformers(model, settings, context.args)
    else:
        _with_vllm(model, settings, context.args, additional_config)


def _with_vllm(model: str, settings: "ServingSettings", given: list[str], additional_config: str | None) -> None:
    from spider_sense.models import model_folder
    from spider_sense.serving.checks import check_settings
    from spider_sense.serving.launch import check_installed, serve_command, serve_environment

    check_installed()
    read = check_settings(settings)
    environment = serve_environment(os.environ)
    command = serve_command(model, model_folder(model), read, settings, given, additional_config)
    os.execve(command[0], command, environment)  # noqa: S606 - the command is this library's own


def _with_transformers(model: str, settings: "ServingSettings", given: list[str]) -> None:
    from spider_sense.models import model_folder
    from spider_sense.serving.launch import check_enabled, check_transformers, transformers_options

    check_enabled(os.environ, "transformers serve")
    check_transformers()
    from spider_sense.serving.served import Served
    from spider_sense.serving.transformers_seams import run

    with closing(Served(settings)) as served:
        run(served, model, model_folder(model), transformers_options(served.monitor.guard, given))
