"""Only seams: where vLLM's front end, the processes that answer clients, is taken hold of."""

import functools
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.serving.door import PRINCIPAL, THROTTLE, Door, principals_of
from spider_sense.serving.letters import opened
from spider_sense.serving.origin import name_principal
from spider_sense.serving.reasoning import BATCH, CHAT, RESPONSES
from spider_sense.serving.reload import PATH as RELOAD
from spider_sense.serving.reload import Reload, reload_key
from spider_sense.serving.settings import KEY, find_settings
from spider_sense.serving.throttle import Throttle
from spider_sense.serving.wrap import wrap

if TYPE_CHECKING:
    from spider_sense.serving.front import Front

__all__ = ["check", "install"]

PATH = "/v1/guard"
"""Under ``/v1``, which is what vLLM's API key protects."""
_FRONT = "_spider_sense_front"
"""Attribute of the client of an engine that holds its ``Front``, which is there if it is guarded."""
_VERDICT: ContextVar[Mapping[str, Any] | None] = ContextVar("spider_sense_verdict", default=None)


def install() -> None:
    """Take hold of the front end's classes and functions in this process."""
    from vllm import plugins
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine import async_llm, core_client, output_processor

    wrap(async_llm.AsyncLLM, "__init__", _began)
    for client in (core_client.AsyncMPClient, core_client.DPAsyncMPClient):
        wrap(client, "add_request_async", _named)
    wrap(core_client.AsyncMPClient, "get_output_async", _received)
    wrap(OpenAIServingChat, "create_chat_completion", functools.partial(_hushed, CHAT))
    wrap(OpenAIServingChatBatch, "create_batch_chat_completion", functools.partial(_hushed, BATCH))
    wrap(OpenAIServingResponses, "create_responses", functools.partial(_hushed, RESPONSES))
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


def _began(original: Callable[..., Any], engine: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    settings = find_settings(engine.vllm_config.additional_config)
    if settings is None:
        return
    from spider_sense.serving.front import Front

    guard, policy = Guard.from_pretrained(settings.guard), settings.load_policy()
    setattr(engine.engine_core, _FRONT, Front(guard, policy, version("spider-sense")))


async def _named(original: Callable[..., Any], client: Any, request: Any) -> Any:
    """Send a request to the engine under its principal's name, without what its client wrote there."""
    front: Front | None = getattr(client, _FRONT, None)
    if front is not None and request.sampling_params is not None:
        principal = PRINCIPAL.get()
        if principal is None and front.throttle is not None:
            raise SpiderSenseError(
                "the policy throttles, and this request came in by another way than the HTTP server, where nobody can "
                "be slowed; serve with `vllm serve`, or take the action throttle out of the policy"
            )
        name_principal(request.sampling_params, principal)
    return await original(request)


async def _received(original: Callable[..., Any], client: Any) -> Any:
    received = await original()
    # Taken off here, before vLLM counts outputs for metrics of its own.
    told, front = opened(received), getattr(client, _FRONT, None)
    if told is not None and front is not None:
        front.take(told)
    return received


async def _hushed(
    fields: Mapping[str, Any],
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """Answer a request, with other ``fields`` if its principal has come to be answered without reasoning."""
    front: Front | None = getattr(getattr(serving.engine_client, "engine_core", None), _FRONT, None)
    if front is not None and front.hush is not None and PRINCIPAL.get() in front.hush:
        for name, value in fields.items():
            setattr(request, name, value)
    return await original(request, *args, **options)


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
    """``GET /v1/guard``, the operator's endpoint and the door, as vLLM takes endpoints from plugins."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._front: Front | None = None
        self._reload: Reload | None = None

    def attach_router(self, app: Any) -> None:
        """Add the routes, and the door where principals are told apart, if a guard is named.

        Raises:
            ConfigError: if they are not, and have to be, or the operator's key can be guessed or is a client's.
        """
        args = app.state.args
        settings = find_settings(args.additional_config)
        if settings is None:
            return
        app.get(PATH)(self.read)
        # As vLLM takes its keys from the two.
        keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
        key = reload_key(keys)
        if key is not None:
            self._reload = Reload(key)
            app.add_route(RELOAD, self._reload, methods=["POST"], include_in_schema=False)
        principals = principals_of(settings, settings.load_policy(), keys)
        if principals is not None:
            app.add_middleware(Door, principals=principals, past=(RELOAD,))

    async def init_state(self, engine: Any, state: Any, args: Any) -> None:
        """Ask the engine what is in force, and let the door know who is slowed."""
        front: Front | None = getattr(engine.engine_core, _FRONT, None)
        if front is None:
            return
        front.said = await engine.engine_core.call_utility_async("spider_sense_about")
        setattr(state, THROTTLE, front.throttle)
        self._front = front
        if self._reload is not None:
            self._reload.engine = engine

    async def read(self) -> Mapping[str, Any]:
        """Say which guard is in force, and how."""
        return {} if self._front is None else self._front.said
