"""``spider-sense serve``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app

__all__ = ["serve"]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id or .gguf file; smollm2 is the packaged model.")],
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    policy: Annotated[Path | None, typer.Option(help="Policy YAML; by default breaches are stopped.")] = None,
    audit: Annotated[Path | None, typer.Option(help="Append events to this JSON-lines file.")] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="Record prompts too.")] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Show clients scores, which they can climb.")] = False,
    allow_uncertified: Annotated[
        bool, typer.Option("--allow-uncertified", help="Accept a dtype or quantisation not calibrated for.")
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
    """Serve a model with vLLM under a guard; after the model come any options of `vllm serve`."""
    from spider_sense.config import parse
    from spider_sense.errors import ConfigError
    from spider_sense.models import model_folder
    from spider_sense.serving.checks import check_settings
    from spider_sense.serving.launch import check_installed, serve_command, serve_environment
    from spider_sense.serving.settings import ServingSettings

    if model.startswith("-"):
        raise ConfigError(f"{model} stands where the model is expected; name the model first")
    check_installed()
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
    read = check_settings(settings)
    environment = serve_environment(os.environ)
    command = serve_command(model, model_folder(model), read, settings, context.args, additional_config)
    os.execve(command[0], command, environment)  # noqa: S606 - the command is this library's own
