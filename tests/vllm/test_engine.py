"""The guard inside a real vLLM engine finds what transformers finds, whatever the engine does to the rows."""

import copy
import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spider_sense.bench import random_guard
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.scoring import Aggregator, Span
from spider_sense.serving import core_seams
from spider_sense.serving.actor import ACTOR
from spider_sense.types import Site

pytestmark = pytest.mark.vllm
Offline = Callable[[Path, list[int], int], tuple[torch.Tensor, torch.Tensor]]
SHADOW = Path(__file__).parents[2] / "configs" / "policy-shadow.yaml"
REFUSAL = "I can't help with that."
FULL = Path("/dev/full")


def assert_equals_offline(one: dict[str, Any], guard: Path, offline: Offline) -> None:
    """Compare an answer with an offline score of the same tokens: 1e-4 of the score, and every token is covered."""
    said = one["said"]
    assert said is not None
    covered = said["coverage"]
    tokens = covered["scored"] + covered["cached"]
    assert covered["missing"] == 0
    assert tokens == len(one["prompt"]) + len(one["tokens"]) - 1
    want_H, _ = offline(guard, (one["prompt"] + one["tokens"])[:tokens], len(one["prompt"]))
    found_H = torch.tensor([float(detector["score"]) for detector in said["detectors"].values()])
    error_H = (found_H - want_H).abs() / want_H.abs().clamp(min=1.0)
    assert error_H.max() <= 1e-4, error_H


@pytest.fixture(scope="module")
def before_the_guard(
    guard: Path, prompts: list[list[int]], new_cache: Callable[[], Path], run_engine: Callable[..., Any]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Answers of an engine that is traced with the guard switched off, and the environment that names its cache."""
    traced = {"VLLM_CPU_CI_ENV": "1", "VLLM_CACHE_ROOT": str(new_cache())}
    (found,) = run_engine(
        [prompts], {"guard": str(guard)}, environment={**traced, "SPIDER_SENSE_ENABLED": "0"}, enforce_eager=False
    )
    return found, traced


def test_a_guard_is_inert_where_it_is_switched_off(before_the_guard: Any, bare: list[dict[str, Any]]) -> None:
    off, _ = before_the_guard
    assert all(one["said"] is None for one in (*bare, *off))
    for one, unguarded in zip(off, bare, strict=True):
        assert one["tokens"] == unguarded["tokens"][: len(one["tokens"])]


# Compiled whole the model is in the tests of the server.
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_verdicts_equal_offline_ones_cold_and_warm_and_no_token_changes(
    traced: bool,
    before_the_guard: Any,
    guard: Path,
    prompts: list[list[int]],
    bare: list[dict[str, Any]],
    run_engine: Callable[..., Any],
    offline: Offline,
) -> None:
    # The cache is that of an engine that was there before the guard: its graph holds no taps.
    engine, environment = ({"enforce_eager": False}, before_the_guard[1]) if traced else ({}, {})
    # A step takes 64 tokens, so that most of the prompts come in chunks.
    cold, warm = run_engine(
        [prompts, prompts], {"guard": str(guard), "scores": True}, environment=environment, **engine
    )
    for first, second, unguarded in zip(cold, warm, bare, strict=True):
        assert first["tokens"] == unguarded["tokens"][: len(first["tokens"])]
        assert_equals_offline(first, guard, offline)
        assert_equals_offline(second, guard, offline)
        assert second["tokens"] == first["tokens"]
        cached = second["said"]["coverage"]["cached"]
        # A block holds 128 tokens, and of a whole prompt in the cache the last token is computed again.
        assert cached == (len(first["prompt"]) - 1) // 128 * 128
    assert any(second["said"]["coverage"]["cached"] for second in warm)


def test_an_engine_that_finds_its_own_graph_in_the_cache_scores_alike(
    before_the_guard: Any, guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline
) -> None:
    settings, cache = {"guard": str(guard), "scores": True}, before_the_guard[1]
    for _ in range(2):
        (found,) = run_engine([prompts[:3]], settings, {"max_tokens": 4}, environment=cache, enforce_eager=False)
        for one in found:
            assert_equals_offline(one, guard, offline)


def test_the_second_runner_says_the_same(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline
) -> None:
    few = [prompts[0], prompts[3], prompts[11], prompts[5]]
    cold, warm = run_engine(
        [few, few[2:3]],
        {"guard": str(guard), "scores": True},
        {"max_tokens": 4},
        second_runner=True,
        dummy_batches=True,
    )
    for one in (*cold, *warm):
        assert_equals_offline(one, guard, offline)
    assert warm[0]["said"]["coverage"]["cached"] == (len(prompts[11]) - 1) // 128 * 128 > 0


def test_a_breach_ends_its_request_before_the_next_token_and_no_other(
    guard: Path,
    prompts: list[list[int]],
    bare: list[dict[str, Any]],
    run_engine: Callable[..., Any],
    offline: Offline,
    one_head: Callable[[str, float, float], Path],
) -> None:
    # After each token, from the last one of the prompt on; the last token passes through no model.
    traces = [
        offline(guard, one["prompt"] + one["tokens"][:-1], len(one["prompt"]))[1][len(one["prompt"]) - 1 :, 0]
        for one in bare
    ]
    peaks = torch.stack([trace.max() for trace in traces]).sort().values
    threshold = float((peaks[5] + peaks[6]) / 2)
    strict = one_head("head0", threshold, threshold)
    # A client may ask for log-probabilities, of the refusal too.
    asked = {"max_tokens": 24, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1}
    (found,) = run_engine([prompts], {"guard": str(strict)}, asked)
    stopped = []
    for one, before, trace in zip(found, bare, traces, strict=True):
        assert list(one["said"]["detectors"]["head0"]) == ["zone"], "a client is told no score"
        assert one["prompt_logprobs"] == len(one["prompt"])
        over = (trace >= threshold).nonzero()
        if not len(over):
            assert one["tokens"] == before["tokens"]
            assert (one["finish_reason"], one["said"]["action"]) == ("length", "observe")
            continue
        answered = int(over[0])
        stopped.append(answered)
        assert one["tokens"][:answered] == before["tokens"][:answered]
        assert one["text"].endswith(REFUSAL)
        assert (one["finish_reason"], one["said"]["zone"], one["said"]["action"]) == ("stop", "breach", "stop")
        assert one["stop_reason"].startswith("spider_sense: head0 breach")
        assert one["said"]["coverage"]["scored"] == len(one["prompt"]) + answered
    assert len(stopped) == 6
    assert max(stopped) > 0, "one of them while it was generating"


def test_a_guard_for_another_model_does_not_start(
    guard: Path, refusals: Callable[..., list[str]], tmp_path: Path
) -> None:
    manifest = Guard.from_pretrained(guard).manifest
    other = manifest.fingerprint.model_copy(update={"weight_digest": "0" * 64})
    wrong = Guard(manifest.model_copy(update={"fingerprint": other}), Guard.from_pretrained(guard).probes)
    wrong.save_pretrained(tmp_path / "wrong")
    model, dtype, adapters, name, nowhere, scheduler = refusals(
        ({"guard": str(tmp_path / "wrong")}, {}),
        ({"guard": str(guard)}, {"dtype": "bfloat16"}),
        ({"guard": str(guard)}, {"enable_lora": True}),
        ({"gaurd": str(guard)}, {}),
        ({"guard": str(tmp_path / "to_come")}, {}),
        ({"guard": str(guard)}, {"scheduler_cls": "own_scheduler.OwnScheduler"}),
    )
    assert re.search(r"weight_digest is .* expected '0000", model)
    assert re.search(r"uncertified serving configuration .*bfloat16", dtype)
    assert re.search(r"uncertified serving configuration .*LoRA", adapters)
    assert "gaurd" in name
    assert "to_come/guard.json does not exist" in nowhere
    assert "own_scheduler.OwnScheduler takes in tokens by an update_from_output of its own" in scheduler


def test_an_engine_that_scores_otherwise_does_not_start(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], tmp_path: Path
) -> None:
    read = Guard.from_pretrained(guard)
    canaries = read.manifest.canaries
    assert canaries is not None
    scores = canaries.prompts[2].scores
    moved = canaries.prompts[2].model_copy(update={"scores": (*scores[:7], (scores[7] or 0.0) + 0.01, *scores[8:])})
    other = canaries.model_copy(update={"prompts": (*canaries.prompts[:2], moved, *canaries.prompts[3:])})
    drifted = Guard(read.manifest.model_copy(update={"canaries": other}), read.probes)
    drifted.save_pretrained(tmp_path / "drifted")
    said = r"does not score as the guard was calibrated: head7 scores canary 2 .* difference of 0\.01, where 0\.0001 is"
    # The front end is told, although the engine is a process of its own.
    process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with pytest.raises(RuntimeError, match=rf"(?s){said}.*Engine core initialization failed"):
        run_engine([prompts[:1]], {"guard": str(tmp_path / "drifted")}, environment=process)


@pytest.fixture(scope="module")
def blocks_of_32(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers of an engine with blocks of 32 tokens and whole prompts in a step, and its audit log.

    First the guard's longest canary is asked, then three copies of each of two long prompts.
    """
    audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    alone, copies = run_engine(
        [[longest_canary(guard)], prompts[-2:]],
        {"guard": str(guard), "scores": True, "audit": str(audit)},
        [{"ignore_eos": True}, {"n": 3, "temperature": 1.0}],
        block_size=32,
        max_num_batched_tokens=2048,
    )
    return alone, copies, [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]


def longest_canary(guard: Path) -> list[int]:
    canaries = Guard.from_pretrained(guard).manifest.canaries
    assert canaries is not None
    return max((list(canary.tokens) for canary in canaries.prompts), key=len)


def test_canaries_leave_nothing_behind(guard: Path, blocks_of_32: Any) -> None:
    (found,), copies, events = blocks_of_32
    length = len(longest_canary(guard))
    assert length > 32
    assert found["said"]["coverage"] == {"scored": length + 11, "cached": 0, "missing": 0}
    marked = [event["event"] for event in events if event["request"].startswith("spider_sense canary ")]
    assert marked.count("open") == marked.count("close") == 8
    assert len({event["request"] for event in events}) == 8 + 1 + len(copies)


def test_a_guard_without_canaries_says_so_once(
    one_head: Callable[[str, float, float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.spider_sense"), "warning", lambda text, *_: lines.append(text))
    settings = {"spider_sense": {"guard": str(one_head("head0", 1.0, 2.0))}}
    core = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=settings), scheduler=SimpleNamespace(**{ACTOR: None})
    )
    begun: list[bool] = []
    for _ in range(2):
        core_seams.begun(lambda: begun.append(True), core)
    assert len(begun) == 2
    (line,) = lines
    assert "has no canaries" in line
    said = core_seams.in_force(core)
    assert said is not None
    assert (said["guard"]["detectors"][0]["name"], said["canaries"]) == ("head0", None)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_what_cannot_be_recorded_is_refused_and_the_engine_goes_on(
    guard: Path,
    prompts: list[list[int]],
    run_engine: Callable[..., Any],
    refusals: Callable[..., list[str]],
    one_head: Callable[[str, float, float], Path],
) -> None:
    few = prompts[:3]
    first, second = run_engine([few, few], {"guard": str(one_head("head0", 1e6, 2e6)), "audit": str(FULL)})
    for one in (*first, *second):
        assert (one["text"], one["finish_reason"]) == (REFUSAL, "stop")
        assert one["stop_reason"] == "spider_sense: it could not be recorded: what is not recorded is stopped"
    (canaries,) = refusals(({"guard": str(guard), "audit": str(FULL)}, {}))
    assert re.search(r"the audit log did not take \d+ events of the guard's canaries", canaries)


@pytest.mark.parametrize("second_runner", [False, True], ids=["first", "second"])
def test_preempted_requests_lose_nothing(
    second_runner: bool, guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline
) -> None:
    # Seven requests that want two blocks each in the end, and one more later, in eight blocks.
    short = [ids[:120] for ids in prompts[-7:]]
    (found,) = run_engine(
        [short],
        {"guard": str(guard), "scores": True},
        {"max_tokens": 16, "ignore_eos": True},
        second_runner=second_runner,
        preempts=True,
        num_gpu_blocks_override=9,
        max_num_batched_tokens=256,
    )
    for one in found:
        assert_equals_offline(one, guard, offline)


def test_copies_of_a_prompt_are_told_apart(guard: Path, offline: Offline, blocks_of_32: Any) -> None:
    _, found, _ = blocks_of_32
    assert len(found) == 6
    assert len({tuple(one["tokens"]) for one in found[:3]}) == 3
    # The copies begin in one step, and all but one of them after blocks that the first fills in it.
    assert any(one["said"]["coverage"]["cached"] for one in found)
    for one in found:
        assert_equals_offline(one, guard, offline)


def test_a_prompt_that_ends_where_another_goes_on_is_covered_in_full(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline, tmp_path: Path
) -> None:
    tail = reading("tail", guard, tmp_path / "tail")
    (other, longest), inside = prompts[-2:], 128 + Guard.from_pretrained(tail).manifest.template.tail - 1
    # A block ends inside the tail of the shorter one, filled for the longer one first and for the shorter one first.
    rounds = [[longest], [longest[:inside]], [other[:inside]], [other], [longest]]
    found = run_engine(rounds, {"guard": str(tail), "scores": True})
    for (one,) in found:
        assert_equals_offline(one, tail, offline)
    assert [one["said"]["coverage"]["cached"] for (one,) in found] == [0, 0, 0, 128, 128]


def reading(span: Span, guard: Path, folder: Path) -> Path:
    """Save a guard of the same heads that read but a part of a conversation."""

    def changed(aggregator: Aggregator) -> Aggregator:
        return aggregator.model_copy(update={"span": span})

    whole = Guard.from_pretrained(guard)
    detectors = [one.model_copy(update={"aggregator": changed(one.aggregator)}) for one in whole.manifest.detectors]
    probes = [dataclasses.replace(probe, aggregator=changed(probe.aggregator)) for probe in whole.probes]
    manifest = whole.manifest.model_copy(update={"detectors": tuple(detectors), "canaries": None})
    Guard(manifest, tuple(probes)).save_pretrained(folder)
    return folder


def test_the_next_turn_of_a_chat_is_covered_in_full_where_heads_read_prompts_alone(
    guard: Path, prompts: list[list[int]], run_engine: Callable[..., Any], offline: Offline, tmp_path: Path
) -> None:
    alone = reading("prompt", guard, tmp_path / "prompt")
    # Prompts that end early in their second block, and answers that fill it.
    asked, sampling = [prompt[:40] for prompt in prompts[-3:]], {"max_tokens": 40, "ignore_eos": True}
    found = run_engine([asked, [0, 1, 2], [0, 1, 2]], {"guard": str(alone), "scores": True}, sampling, block_size=32)
    for one in (one for answers in found for one in answers):
        assert_equals_offline(one, alone, offline)
    # The second turn computes the answer to the first again, and the third begins with it.
    cached = [{one["said"]["coverage"]["cached"] for one in answers} for answers in found]
    assert cached == [{0}, {32}, {64}]


@pytest.fixture
def adapted(loaded: LoadedModel, tmp_path: Path) -> tuple[LoadedModel, Path]:
    """The model with a random LoRA adapter in its weights, and the folder of that adapter."""
    model: Any = copy.deepcopy(loaded.model)
    rank, generator = 4, torch.Generator().manual_seed(0)
    parts: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "v_proj"):
        for place, layer in enumerate(model.model.layers):
            weight = getattr(layer.self_attn, name).weight.data
            down_RD = torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            up_OR = torch.randn(weight.shape[0], rank, generator=generator) * weight.std()
            weight += up_OR @ down_RD
            key = f"base_model.model.model.layers.{place}.self_attn.{name}"
            parts |= {f"{key}.lora_A.weight": down_RD, f"{key}.lora_B.weight": up_OR}
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    save_file(parts, tmp_path / "adapter_model.safetensors")
    return dataclasses.replace(loaded, model=model), tmp_path


def test_requests_for_an_adapter_are_scored_as_the_adapted_model_computes_them(
    adapted: tuple[LoadedModel, Path],
    guard: Path,
    prompts: list[list[int]],
    run_engine: Callable[..., Any],
    offline: Offline,
    offline_of: Callable[[LoadedModel], Offline],
) -> None:
    model, folder = adapted
    # Both are asked the same, so that either could take up what the cache holds of the other.
    pairs = [prompt for prompt in prompts[6:] for _ in ("base", "adapted")]
    cold, warm = run_engine(
        [pairs, pairs],
        {"guard": str(guard), "policy": str(SHADOW), "scores": True, "allow_uncertified": True},
        adapter=folder,
        enable_lora=True,
        max_lora_rank=8,
        # With one slot the operators of vLLM on a CPU adapt everybody in a batch: they take slot -1 for the last.
        max_loras=2,
    )
    of_adapted = offline_of(model)
    for place, one in enumerate((*cold, *warm)):
        assert_equals_offline(one, guard, of_adapted if place % 2 else offline)
    for base, other in zip(cold[::2], cold[1::2], strict=True):
        scores = [[found["score"] for found in one["said"]["detectors"].values()] for one in (base, other)]
        assert (torch.tensor(scores[0]) - torch.tensor(scores[1])).abs().max() > 0.1, "the adapter changes nothing"
    assert all(one["said"]["coverage"]["cached"] for one in warm)


def test_two_ranks_find_what_one_model_finds_and_the_first_of_them_stops(
    even: LoadedModel,
    prompts: list[list[int]],
    run_engine: Callable[..., Any],
    offline_of: Callable[[LoadedModel], Offline],
    guards: Any,
    tmp_path: Path,
) -> None:
    whole, offline = random_guard(even, 64, tuple(Site(layer, "resid") for layer in range(4))), offline_of(even)
    whole.save_pretrained(tmp_path / "clear")
    peaks = sorted(float(offline(tmp_path / "clear", prompt, len(prompt))[0][0]) for prompt in prompts)
    threshold = (peaks[5] + peaks[6]) / 2
    first = whole.manifest.detectors[0].model_copy(update={"calibration": guards.calibration(threshold, threshold)})
    manifest = whole.manifest.model_copy(update={"detectors": (first, *whole.manifest.detectors[1:])})
    folder = tmp_path / "strict"
    Guard(manifest, whole.probes).save_pretrained(folder)
    found = run_engine(
        [prompts, prompts],
        {"guard": str(folder), "scores": True},
        # Each rank compiles a graph of its own, and only that of the first holds the taps.
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "1"},
        enforce_eager=False,
        model=even.model.name_or_path,
        tensor_parallel_size=2,
    )
    for one in (one for round_ in found for one in round_):
        said, prompt = one["said"], len(one["prompt"])
        if said["action"] != "stop":
            assert_equals_offline(one, folder, offline)
            continue
        scored = said["coverage"]["scored"] + said["coverage"]["cached"]
        _, trace = offline(folder, (one["prompt"] + one["tokens"])[:scored], prompt)
        over = (trace[prompt - 1 :, 0] >= threshold).tolist()
        assert over == [False] * (scored - prompt) + [True], "it was stopped before the token after the breach"
        assert one["text"].endswith(REFUSAL)
    for round_ in found:
        assert 6 <= sum(one["said"]["action"] == "stop" for one in round_) < len(prompts)
    assert any(one["said"]["coverage"]["cached"] for one in found[1])
