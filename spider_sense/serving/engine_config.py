"""Only seams: what of vLLM's configuration decides whether an engine can be guarded."""

import logging
from pathlib import Path
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.extraction.online import read_artifact
from spider_sense.fingerprint import Fingerprint, ServingConfig
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.serving import patch_seams
from spider_sense.serving.checkpoint import checkpoint_fingerprint
from spider_sense.serving.settings import ServingSettings

__all__ = [
    "check_engine",
    "check_guard",
    "check_model",
    "check_order",
    "keep_ranks_alike",
    "serving_of",
    "tokenizer_of",
]

_log = logging.getLogger(__name__)

ANY_ADAPTER = "LoRA"
"""Stands for every adapter that an engine may come to load."""


def check_engine(config: Any) -> None:
    """Check that a guard will see every token.

    Raises:
        ConfigError: naming the options with which it would not.
    """
    parallel, speculative = config.parallel_config, config.speculative_config
    unsupported = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "speculative_config with async scheduling": bool(
            speculative is not None and config.scheduler_config.async_scheduling
        ),
        # Drafts are cut on the device alone, so that the host knows no more which row is whose.
        "enable_adaptive_verification": bool(speculative is not None and speculative.enable_adaptive_verification),
        "kv_transfer_config": config.kv_transfer_config is not None,
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
        "enable_dbo or ubatch_size": parallel.use_ubatching,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
        "enable_expert_parallel with tensor and data parallelism": parallel.use_sequence_parallel_moe,
        "enable_elastic_ep": parallel.enable_elastic_ep,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise ConfigError(f"a guard cannot see every token with {', '.join(found)}; serve without, or without a guard")


def keep_ranks_alike(config: Any) -> None:
    """Switch off what would let the ranks of tensor parallelism compile different collectives.

    Only one rank has taps. Where one reads what an all-reduce returns, the all-reduce is not fused with the norm that
    follows; on the other ranks it would be, and the two kinds do not answer each other.
    """
    passes = config.compilation_config.pass_config
    if config.parallel_config.tensor_parallel_size > 1 and passes.fuse_allreduce_rms:
        passes.fuse_allreduce_rms = False
        _log.warning("pass_config.fuse_allreduce_rms is switched off: a guard's taps would let the ranks differ")


def check_model(config: Any, guard: Guard, settings: ServingSettings) -> None:
    """Check that a guard, what watches for extraction and the patch of the policy were made for the served model.

    Raises:
        MismatchError: with both values.
        ConfigError: if LoRA adapters would change the rows that the policy's patch changes, or prompts are to be read
            again and steps are scheduled ahead of the verdict.
    """
    found = checkpoint_fingerprint(Path(config.model_config.model), tokenizer_of(config))
    serving = serving_of(config)
    check_guard(guard, found, serving, settings.allow_uncertified)
    if settings.extraction is not None:
        read_artifact(settings.load_extraction()).check_model(found)
    patched = patch_seams.find_patch(settings)
    if patched is not None:
        patched[0].check_model(found)
        if serving.adapters:
            raise ConfigError(
                "the policy's patch moves rows of projections that LoRA adapters may move too; serve without "
                "--enable-lora, or take the action patch out of the policy"
            )
    check_order(config, settings.load_policy())


def check_order(config: Any, policy: Policy) -> None:
    """Check that the verdict on a prompt comes before the next step, if a policy wants prompts to be read again.

    Raises:
        ConfigError: if it does not.
    """
    if policy.reads_again and config.scheduler_config.async_scheduling:
        raise ConfigError(
            "patch.begin is 'prompt', and with asynchronous scheduling the next step is on its way before the verdict "
            "on a prompt is known; serve with --no-async-scheduling, or with patch.begin: token"
        )


def check_guard(guard: Guard, found: Fingerprint, serving: ServingConfig, allow_uncertified: bool) -> None:
    """Check that a guard was made for a checkpoint, and for the way in which it is served.

    Raises:
        MismatchError: with both values.
    """
    # Adapters and the cache are not in the checkpoint: it has to be the guard's, whatever is allowed beside it.
    guard.check_model(found, serving.model_copy(update={"adapters": (), "kv_cache": None}), allow_uncertified)
    guard.check_model(found, serving, allow_uncertified)


def serving_of(config: Any) -> ServingConfig:
    """Return how vLLM's configuration says that the model runs; which adapters will be loaded it does not know."""
    model = config.model_config
    dtype = str(model.dtype).removeprefix("torch.")
    adapters = () if config.lora_config is None else (ANY_ADAPTER,)
    cache = config.cache_config.cache_dtype
    return ServingConfig(
        dtype=dtype,
        quantization=model.quantization,
        adapters=adapters,
        kv_cache=None if cache in ("auto", dtype) else cache,
    )


def tokenizer_of(config: Any) -> Any:
    """Return the tokenizer of an engine."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config.model_config)
