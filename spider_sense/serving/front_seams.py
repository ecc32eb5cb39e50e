"""Only seams: where vLLM's front end, the processes that answer clients, is taken hold of.

What is to be counted reaches it as an output for a request that does not exist. Its own requests never carry it, so no
client can be handed a score by mistake, and requests that a client left are counted like any other.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

from spider_sense.guard import Guard
from spider_sense.serving.about import about
from spider_sense.serving.findings import Note
from spider_sense.serving.settings import KEY, find_settings

__all__ = ["install", "send"]

PATH = "/v1/guard"
"""Under ``/v1``, which is what vLLM's API key protects."""
_METRICS = "_spider_sense_metrics"
_VERDICT: ContextVar[Mapping[str, Any] | None] = ContextVar("spider_sense_verdict", default=None)
Wrap = Callable[[Any, str, Callable[..., Any]], None]


def install(wrap: Wrap) -> None:
    """Take hold of the front end's classes and functions in this process.

    Args:
        wrap: puts a function around one of an owner, by its name.
    """
    from vllm import plugins
    from vllm.v1.engine import async_llm, core_client, output_processor

    wrap(async_llm.AsyncLLM, "__init__", _began)
    wrap(core_client.AsyncMPClient, "get_output_async", _received)
    wrap(output_processor.OutputProcessor, "do_tracing", _traced)
    wrap(output_processor, "instrument_manual", _spanned)
    wrap(plugins, "load_endpoint_plugins", _endpoints)


def send(outputs: dict[int, Any], note: Note) -> None:
    """Put a note into the outputs of a step by client; whichever process gets it counts it."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    letter = EngineCoreOutput(request_id=KEY, new_token_ids=[], kv_transfer_params={**note})
    outputs.setdefault(next(iter(outputs), 0), EngineCoreOutputs()).outputs.append(letter)


def _began(original: Callable[..., Any], engine: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    settings = find_settings(engine.vllm_config.additional_config)
    if settings is None:
        return
    from spider_sense.serving.prometheus import GuardMetrics

    guard, policy = Guard.from_pretrained(settings.guard), settings.load_policy()
    setattr(engine.engine_core, _METRICS, GuardMetrics(guard, policy, version("spider-sense")))


async def _received(original: Callable[..., Any], client: Any) -> Any:
    received = await original()
    # Taken off here, before vLLM counts outputs for metrics of its own.
    if received.outputs and received.outputs[-1].request_id == KEY and received.outputs[-1].kv_transfer_params:
        letter, metrics = received.outputs.pop(), getattr(client, _METRICS, None)
        if metrics is not None:
            metrics.count(letter.kv_transfer_params)
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
    """Add the guard's endpoint. vLLM loads one by entry point only where ``VLLM_PLUGINS`` names it; naming a guard is
    consent enough."""
    return [*original(tasks), *([_Endpoint()] if "generate" in (tasks or ()) else [])]


class _Endpoint:
    """``GET /v1/guard``, as vLLM takes endpoints from plugins."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._about: dict[str, Any] = {}

    def attach_router(self, app: Any) -> None:
        """Add the route, if a guard is named."""
        if find_settings(app.state.args.additional_config) is not None:
            app.get(PATH)(self.read)

    async def init_state(self, engine: Any, state: Any, args: Any) -> None:
        """Read what is in force, once."""
        settings = find_settings(engine.vllm_config.additional_config)
        if settings is None:
            return
        import vllm

        versions = {"spider_sense": version("spider-sense"), "vllm": vllm.__version__}
        self._about = about(Guard.from_pretrained(settings.guard), settings.load_policy(), settings, versions)

    async def read(self) -> dict[str, Any]:
        """Say which guard is in force, and how."""
        return self._about
