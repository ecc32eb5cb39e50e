"""Only seams: what of vLLM's configuration decides whether an engine can be guarded."""

from pathlib import Path
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.extraction.online import read_artifact
from spider_sense.fingerprint import ServingConfig
from spider_sense.guard import Guard
from spider_sense.serving import patch_seams
from spider_sense.serving.checkpoint import checkpoint_fingerprint
from spider_sense.serving.settings import ServingSettings

__all__ = ["check_engine", "check_model", "serving_of", "tokenizer_of"]


def check_engine(config: Any) -> None:
    """Check that a guard will see every token.

    Raises:
        ConfigError: naming the options with which it would not.
    """
    parallel = config.parallel_config
    unsupported = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "speculative_config with async scheduling": bool(
            config.speculative_config is not None and config.scheduler_config.async_scheduling
        ),
        "kv_transfer_config": config.kv_transfer_config is not None,
        "enable_lora": config.lora_config is not None,
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
        "enable_dbo": parallel.enable_dbo,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
        "enable_expert_parallel with tensor and data parallelism": parallel.use_sequence_parallel_moe,
        "enable_elastic_ep": parallel.enable_elastic_ep,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise ConfigError(f"a guard cannot see every token with {', '.join(found)}; serve without, or without a guard")


def check_model(config: Any, guard: Guard, settings: ServingSettings) -> None:
    """Check that a guard, what watches for extraction and the patch of the policy were made for the served model.

    Raises:
        MismatchError: with both values.
    """
    model = config.model_config
    found = checkpoint_fingerprint(Path(model.model), tokenizer_of(config))
    guard.check_model(found, serving_of(model), settings.allow_uncertified)
    if settings.extraction is not None:
        read_artifact(settings.load_extraction()).check_model(found)
    patched = patch_seams.find_patch(settings)
    if patched is not None:
        patched[0].check_model(found)


def serving_of(model: Any) -> ServingConfig:
    """Return how vLLM's model configuration says that the model runs."""
    dtype = str(model.dtype).removeprefix("torch.")
    return ServingConfig(dtype=dtype, quantization=model.quantization, adapters=())


def tokenizer_of(config: Any) -> Any:
    """Return the tokenizer of an engine."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config.model_config)
