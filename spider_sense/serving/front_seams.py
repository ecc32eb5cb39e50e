"""Only seams: where vLLM's front end, the processes that answer clients, is taken hold of.

What is to be counted, and who is to be slowed, reaches it as an output for a request that does not exist. Its own
requests never carry it, so no client can be handed a score by mistake, and requests that a client left are counted like
any other.
"""

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.serving.about import about
from spider_sense.serving.door import PRINCIPAL, THROTTLE, Door, principals_of
from spider_sense.serving.findings import Note
from spider_sense.serving.principals import name_principal
from spider_sense.serving.reasoning import HUSH, Hush, hushed_chat
from spider_sense.serving.settings import KEY, find_settings
from spider_sense.serving.throttle import Throttle

__all__ = ["check", "install", "send"]

PATH = "/v1/guard"
"""Under ``/v1``, which is what vLLM's API key protects."""
_METRICS, _THROTTLE = "_spider_sense_metrics", "_spider_sense_throttle"
"""Attributes of the client of an engine, which are there if it is guarded."""
_VERDICT: ContextVar[Mapping[str, Any] | None] = ContextVar("spider_sense_verdict", default=None)
Wrap = Callable[[Any, str, Callable[..., Any]], None]


def install(wrap: Wrap) -> None:
    """Take hold of the front end's classes and functions in this process.

    Args:
        wrap: puts a function around one of an owner, by its name.
    """
    from vllm import plugins
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.v1.engine import async_llm, core_client, output_processor

    wrap(async_llm.AsyncLLM, "__init__", _began)
    for client in (core_client.AsyncMPClient, core_client.DPAsyncMPClient):
        wrap(client, "add_request_async", _named)
    wrap(core_client.AsyncMPClient, "get_output_async", _received)
    wrap(OpenAIServingChat, "create_chat_completion", hushed_chat)
    wrap(output_processor.OutputProcessor, "do_tracing", _traced)
    wrap(output_processor, "instrument_manual", _spanned)
    wrap(plugins, "load_endpoint_plugins", _endpoints)


def check(policy: Policy, usage_context: Any = None, *_: Any, **__: Any) -> None:
    """Check that the front end can do what a policy asks for, before anything is loaded.

    Args:
        policy: in force.
        usage_context: vLLM's, what the engine is for; it stands first among the arguments of its configuration.

    Raises:
        ConfigError: if requests come in by a way that has no door.
        MissingExtraError: if they are to be slowed, and the library for that is not installed.
    """
    from vllm import envs

    if envs.VLLM_USE_RUST_FRONTEND:
        raise ConfigError("VLLM_USE_RUST_FRONTEND: requests would come in past the guard's front end; unset it")
    needs = [action for action in ("throttle", "omit_reasoning") if action in policy.actions]
    if needs and getattr(usage_context, "name", None) != "OPENAI_API_SERVER":
        raise ConfigError(f"the policy's action {needs[0]!r} needs the HTTP server; start it with `vllm serve`")
    if "throttle" in policy.actions:
        Throttle(policy.throttle)


def send(clients: int, outputs: dict[int, Any], note: Note) -> None:
    """Put a note into the outputs of a step.

    Args:
        clients: number of processes that answer clients; whichever gets the note counts, and all hear who is slowed.
        outputs: by client.
        note: of the step.
    """
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    counts = next(iter(outputs), 0)
    for_all = Note(seconds=0.0, ended=[], throttled=note["throttled"], hushed=note.get("hushed", []))
    for client in {counts, *(range(clients) if for_all["throttled"] or for_all["hushed"] else ())}:
        told = note if client == counts else for_all
        letter = EngineCoreOutput(request_id=KEY, new_token_ids=[], kv_transfer_params={**told})
        outputs.setdefault(client, EngineCoreOutputs()).outputs.append(letter)


def _began(original: Callable[..., Any], engine: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    settings = find_settings(engine.vllm_config.additional_config)
    if settings is None:
        return
    from spider_sense.serving.prometheus import GuardMetrics

    guard, policy = Guard.from_pretrained(settings.guard), settings.load_policy()
    setattr(engine.engine_core, _METRICS, GuardMetrics(guard, policy, version("spider-sense")))
    throttle = Throttle(policy.throttle) if "throttle" in policy.actions else None
    setattr(engine.engine_core, _THROTTLE, throttle)
    if policy.extraction is not None:
        setattr(engine.engine_core, HUSH, Hush(policy.extraction.reasoning_seconds))


async def _named(original: Callable[..., Any], client: Any, request: Any) -> Any:
    """Send a request to the engine under its principal's name, whatever the client says there."""
    if hasattr(client, _THROTTLE) and request.sampling_params is not None:
        principal = PRINCIPAL.get()
        if principal is None and getattr(client, _THROTTLE) is not None:
            raise SpiderSenseError(
                "the policy throttles, and this request came in by another way than the HTTP server, where nobody can "
                "be slowed; serve with `vllm serve`, or take the action throttle out of the policy"
            )
        name_principal(request.sampling_params, principal)
    return await original(request)


async def _received(original: Callable[..., Any], client: Any) -> Any:
    received = await original()
    # Taken off here, before vLLM counts outputs for metrics of its own.
    if received.outputs and received.outputs[-1].request_id == KEY and received.outputs[-1].kv_transfer_params:
        note = received.outputs.pop().kv_transfer_params
        metrics, throttle = getattr(client, _METRICS, None), getattr(client, _THROTTLE, None)
        if metrics is not None:
            metrics.count(note)
        if throttle is not None:
            throttle.slow(note["throttled"])
        if (hush := getattr(client, HUSH, None)) is not None:
            hush.add(note.get("hushed", ()))
    return received


def _traced(original: Callable[..., Any], processor: Any, output: Any, *args: Any, **options: Any) -> None:
    token = _VERDICT.set((output.kv_transfer_params or {}).get(KEY))
    try:
        original(output, *args, **options)
    finally:
        _VERDICT.reset(token)


def _spanned(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    said = _VERDICT.get()
    if said is not None:
        found = {name: said[name] for name in ("guard", "zone", "action")}
        found |= {f"coverage.{state}": tokens for state, tokens in said["coverage"].items()}
        named = {f"{KEY}.{name}": value for name, value in found.items()}
        options["attributes"] = {**(options.get("attributes") or {}), **named}
    return original(*args, **options)


def _endpoints(original: Callable[..., list[Any]], tasks: Any = None) -> list[Any]:
    """Add the guard's endpoint and the door. vLLM loads one by entry point only where ``VLLM_PLUGINS`` names it; naming
    a guard is consent enough."""
    return [*original(tasks), *([_Endpoint()] if "generate" in (tasks or ()) else [])]


class _Endpoint:
    """``GET /v1/guard`` and the door, as vLLM takes endpoints from plugins."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._about: dict[str, Any] = {}

    def attach_router(self, app: Any) -> None:
        """Add the route, and the door where principals are told apart, if a guard is named.

        Raises:
            ConfigError: if they are not, and have to be.
        """
        args = app.state.args
        settings = find_settings(args.additional_config)
        if settings is None:
            return
        app.get(PATH)(self.read)
        # As vLLM takes its keys from the two.
        keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
        principals = principals_of(settings, settings.load_policy(), keys)
        if principals is not None:
            app.add_middleware(Door, principals=principals)

    async def init_state(self, engine: Any, state: Any, args: Any) -> None:
        """Read what is in force, once, and let the door know who is slowed."""
        settings = find_settings(engine.vllm_config.additional_config)
        if settings is None:
            return
        setattr(state, THROTTLE, getattr(engine.engine_core, _THROTTLE))
        import vllm

        versions = {"spider_sense": version("spider-sense"), "vllm": vllm.__version__}
        self._about = about(Guard.from_pretrained(settings.guard), settings.load_policy(), settings, versions)

    async def read(self) -> dict[str, Any]:
        """Say which guard is in force, and how."""
        return self._about
