"""What of vLLM's configuration lets a guard see every token, and how the model is served by it."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spider_sense.errors import ConfigError, MismatchError
from spider_sense.fingerprint import ServingConfig
from spider_sense.models import LoadedModel
from spider_sense.serving.engine_config import check_engine, check_guard, keep_ranks_alike, serving_of

PLAIN: dict[str, dict[str, Any]] = {
    "parallel_config": {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "use_ubatching": False,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_sequence_parallel_moe": False,
        "enable_elastic_ep": False,
    },
    "scheduler_config": {"async_scheduling": True},
    "model_config": {"enable_prompt_embeds": False, "dtype": torch.bfloat16, "quantization": None},
    "cache_config": {"kv_sharing_fast_prefill": False, "cache_dtype": "auto"},
}


def engine(**changes: dict[str, Any]) -> Any:
    parts = {name: SimpleNamespace(**(fields | changes.get(name, {}))) for name, fields in PLAIN.items()}
    passes = SimpleNamespace(fuse_allreduce_rms=True)
    speculative = changes.get("speculative_config")
    return SimpleNamespace(
        **parts,
        speculative_config=speculative and SimpleNamespace(**speculative),
        kv_transfer_config=None,
        lora_config=changes.get("lora_config"),
        compilation_config=SimpleNamespace(pass_config=passes),
    )


def test_a_plain_engine_is_guarded() -> None:
    check_engine(engine())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pipeline_parallel_size", {"parallel_config": {"pipeline_parallel_size": 2}}),
        ("enable_dbo or ubatch_size", {"parallel_config": {"use_ubatching": True}}),
        (
            "enable_adaptive_verification",
            {
                "scheduler_config": {"async_scheduling": False},
                "speculative_config": {"enable_adaptive_verification": True},
            },
        ),
        ("speculative_config with async scheduling", {"speculative_config": {"enable_adaptive_verification": False}}),
        ("kv_sharing_fast_prefill", {"cache_config": {"kv_sharing_fast_prefill": True}}),
    ],
)
def test_what_hides_tokens_is_refused_by_name(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"cannot see every token with {name};"):
        check_engine(engine(**changes))


@pytest.mark.parametrize(("ranks", "fused"), [(1, True), (2, False)])
def test_ranks_compile_the_same_collectives(ranks: int, fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = engine(parallel_config={"tensor_parallel_size": ranks})
    with caplog.at_level(logging.WARNING):
        keep_ranks_alike(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is fused
    assert ("fuse_allreduce_rms is switched off" in caplog.text) is not fused


@pytest.mark.parametrize(
    ("cache", "said"), [("auto", None), ("bfloat16", None), ("fp8", "fp8"), ("float16", "float16")]
)
def test_a_cache_of_another_type_is_another_configuration(cache: str, said: str | None) -> None:
    found = serving_of(engine(cache_config={"cache_dtype": cache}))
    assert found == ServingConfig(dtype="bfloat16", quantization=None, adapters=(), kv_cache=said)


def test_a_guard_from_before_knows_the_models_own_cache_alone() -> None:
    kept = ServingConfig.model_validate({"dtype": "bfloat16", "quantization": None, "adapters": ()})
    assert kept == serving_of(engine())
    assert kept != serving_of(engine(cache_config={"cache_dtype": "fp8"}))


def test_a_guard_from_before_keeps_its_digest() -> None:
    plain = ServingConfig(dtype="bfloat16", quantization=None, adapters=())
    assert plain.model_dump_json() == '{"dtype":"bfloat16","quantization":null,"adapters":[]}'
    assert '"kv_cache":"fp8"' in plain.model_copy(update={"kv_cache": "fp8"}).model_dump_json()


@pytest.mark.parametrize("changed", [{}, {"kv_cache": "fp8"}, {"adapters": ("LoRA",)}])
def test_other_weights_are_refused_whatever_is_allowed_beside_them(
    tiny_loaded: LoadedModel, guards: Any, changed: dict[str, Any]
) -> None:
    guard = guards.guard(tiny_loaded, guards.many_probes()[:1])
    found, serving = guard.manifest.fingerprint, guard.manifest.certified[0].model_copy(update=changed)
    check_guard(guard, found, serving, allow_uncertified=True)
    with pytest.raises(MismatchError, match="weight_digest"):
        check_guard(guard, found.model_copy(update={"weight_digest": "other"}), serving, allow_uncertified=True)


def test_what_to_do_about_a_cache_that_no_threshold_was_set_for(tiny_loaded: LoadedModel, guards: Any) -> None:
    guard = guards.guard(tiny_loaded, guards.many_probes()[:1])
    serving = guard.manifest.certified[0].model_copy(update={"kv_cache": "fp8"})
    with pytest.raises(MismatchError, match="own type of KV cache, or accept"):
        check_guard(guard, guard.manifest.fingerprint, serving, allow_uncertified=False)
