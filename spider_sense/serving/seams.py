"""Every place where vLLM is taken hold of. Nothing in this package imports vLLM but this and the modules that say
"only seams".

Tested with vLLM 0.32; another minor is refused, since a seam that moved would leave requests unscored.
"""

import functools
from collections.abc import Callable
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.serving import block_keys, front_seams, patch_seams, scheduler_seams, worker_seams
from spider_sense.serving.checks import check_reasoning, check_settings
from spider_sense.serving.choices import collected, gathered
from spider_sense.serving.core_seams import RUN, begun, in_force, made, run_core
from spider_sense.serving.engine_config import check_engine, check_model, keep_ranks_alike
from spider_sense.serving.graph import graph_of
from spider_sense.serving.origin import numbered
from spider_sense.serving.reload_seams import reloaded
from spider_sense.serving.settings import KEY, find_settings
from spider_sense.serving.streams import streamed_chat, streamed_completion
from spider_sense.serving.wrap import wrap

__all__ = ["TESTED", "install"]

TESTED = ("0.32.",)
"""Versions of vLLM that the seams were tested with, by how they begin."""


def install() -> None:
    """Take hold of vLLM's classes in this process; a second call does nothing.

    Of a version that was not tested only the start is watched, to refuse it where a guard is named.
    """
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if not vllm.__version__.startswith(TESTED):
        # A server that names no guard is none of ours, whatever its version.
        wrap(EngineArgs, "create_engine_config", functools.partial(_untested, vllm.__version__))
        return
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.engine.parallel_sampling import ParentRequest

    wrap(EngineArgs, "create_engine_config", _configured)
    wrap(ParentRequest, "get_child_info", numbered)
    wrap(RequestState, "make_request_output", collected)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", streamed_chat)
    wrap(OpenAIServingCompletion, "completion_stream_generator", streamed_completion)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", gathered)
    wrap(EngineCore, "__init__", made)
    for process in (EngineCoreProc, DPEngineCoreProc):
        wrap(process, "run_busy_loop", begun)
    if not hasattr(EngineCoreProc, RUN):
        setattr(EngineCoreProc, RUN, EngineCoreProc.run_engine_core)
        EngineCoreProc.run_engine_core = run_core
    EngineCore.spider_sense_about = in_force
    EngineCore.spider_sense_reload = functools.partialmethod(reloaded, scheduler_seams.new_actor)
    for seams in (worker_seams, scheduler_seams, block_keys, patch_seams, front_seams):
        seams.install()


def _configured(original: Callable[..., Any], args: Any, *rest: Any, **options: Any) -> Any:
    """Check the guard before anything is loaded, and put what of it is compiled into the configuration's hash."""
    settings = find_settings(args.additional_config)
    if settings is None:
        return original(*rest, **options)
    guard = check_settings(settings)
    front_seams.check(settings.load_policy(), *rest, **options)
    check_reasoning(settings.load_policy(), args.reasoning_parser)
    told = settings.model_copy(update={"guard": settings.guard.resolve(), "graph": graph_of(guard, settings)})
    args.additional_config = {**args.additional_config, KEY: told.model_dump(mode="json")}
    config = original(*rest, **options)
    check_engine(config)
    keep_ranks_alike(config)
    check_model(config, guard, settings)
    return config


def _untested(version: str, original: Callable[..., Any], args: Any, *rest: Any, **options: Any) -> Any:
    if find_settings(args.additional_config) is not None:
        raise ConfigError(
            f"vLLM {version} was not tested with this guard, only {', '.join(f'{one}x' for one in TESTED)}; "
            "install a tested version, or unset the guard"
        )
    return original(*rest, **options)
