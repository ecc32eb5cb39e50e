"""The action ``patch`` in a real vLLM engine: what a request answers under it, and that nobody else is touched."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spider_sense.attach import Attachment
from spider_sense.audit import AuditEvent
from spider_sense.bench import random_guard, random_patch
from spider_sense.guard import Guard
from spider_sense.live_patch import LivePatch
from spider_sense.models import LoadedModel
from spider_sense.types import Site

pytestmark = pytest.mark.vllm
Offline = Callable[[Path, list[int], int], tuple[torch.Tensor, torch.Tensor]]
ALPHA = 0.5
DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@dataclasses.dataclass
class Patched:
    """A model, the patch of a policy in a file, and what transformers makes of both."""

    loaded: LoadedModel
    live: LivePatch
    policy: Path
    again: Path
    """The policy that reads suspected prompts again."""

    def logprobs(self, one: dict[str, Any]) -> torch.Tensor:
        """Return [N, V] log-probabilities at each token of an answer, with the patch on from where it says."""
        ids = [*one["prompt"], *one["tokens"]]
        rows = np.arange(one["said"].get("patched_from", len(ids)), len(ids))
        with (
            torch.no_grad(),
            Attachment(
                self.loaded.model,
                {},
                lambda forward: self.live.set(forward.total, rows),
                self.live.rest,
                patchers=self.live.patchers(),
            ),
        ):
            logits: torch.Tensor = self.loaded.model(input_ids=torch.tensor([ids])).logits[0]
        return logits[len(one["prompt"]) - 1 : -1].float().log_softmax(-1)

    def assert_equals(self, one: dict[str, Any]) -> None:
        """Compare an answer that vLLM sampled greedily."""
        want = self.logprobs(one)
        found = torch.tensor(one["logprobs"])
        chosen = want.gather(1, torch.tensor(one["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(found, chosen, rtol=0, atol=1e-4)
        assert (chosen >= want.max(1).values - 1e-4).all()


def patched(loaded: LoadedModel, folder: Path, scale: float) -> Patched:
    patch = random_patch(loaded, rows=32, scale=scale).save_pretrained(folder / "patch")
    rules = [{"detector": "*", "zone": "breach", "action": "patch"}]
    files = {begin: folder / f"{begin}.yaml" for begin in ("token", "prompt")}
    for begin, file in files.items():
        section = {"folder": str(folder / "patch"), "alpha": ALPHA, "begin": begin}
        file.write_text(yaml.safe_dump({"rules": rules, "patch": section}), encoding="utf-8")
    return Patched(loaded, LivePatch(loaded, patch, ALPHA), files["token"], files["prompt"])


@pytest.fixture(scope="module")
def smol(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Patched:
    return patched(loaded, tmp_path_factory.mktemp("smol"), 0.3)


@pytest.fixture(scope="session")
def eight(prompts: list[list[int]]) -> list[list[int]]:
    """Eight prompts of 120 tokens."""
    tokens = [token for prompt in prompts for token in prompt]
    return [tokens[place : place + 120] for place in range(0, 960, 120)]


def test_two_of_eight_are_patched_and_nobody_else_is_touched(
    smol: Patched,
    eight: list[list[int]],
    run_engine: Callable[..., Any],
    offline: Offline,
    one_head: Callable[[str, float, float], Path],
    tmp_path: Path,
) -> None:
    # Short enough that a patch comes on within the first block, of 128 tokens.
    eight = [ids[:100] for ids in eight]
    sampling = {"max_tokens": 40, "ignore_eos": True, "logprobs": 0}
    # All of them in every step, so that both engines compute the same shapes.
    engine = {"max_num_batched_tokens": 2048}
    (bare,) = run_engine([eight], {"guard": str(one_head("head0", 1e9, 1e9))}, sampling, **engine)
    # After each token, from the last one of the prompt on; the last token passes through no model.
    strict = one_head("head0", 1e9, 1e9)
    traces = [
        offline(strict, one["prompt"] + one["tokens"][:-1], len(one["prompt"]))[1][len(one["prompt"]) - 1 :, 0]
        for one in bare
    ]
    peaks = torch.stack([trace.max() for trace in traces])
    highest = peaks.sort().values
    threshold = float((highest[5] + highest[6]) / 2)
    chosen = peaks.topk(2).indices.tolist()
    found, later = run_engine(
        [eight, chosen],
        {
            "guard": str(one_head("head0", threshold, threshold)),
            "policy": str(smol.policy),
            "audit": str(tmp_path / "a"),
            "scores": True,
        },
        sampling,
        **engine,
    )
    for place, (one, before, trace) in enumerate(zip(found, bare, traces, strict=True)):
        if place not in chosen:
            assert one["said"]["action"] == "observe"
            assert "patched_from" not in one["said"]
            assert (one["tokens"], one["logprobs"]) == (before["tokens"], before["logprobs"])
            continue
        # The row after the one that was judged passes through the model under the patch.
        first = int((trace >= threshold).nonzero()[0])
        assert (one["said"]["action"], one["said"]["patched_from"]) == ("patch", 100 + first)
        smol.assert_equals(one)
        assert one["tokens"][: first + 1] == before["tokens"][: first + 1]
        assert one["logprobs"] != before["logprobs"]
    assert [found[place]["tokens"] for place in chosen] != [bare[place]["tokens"] for place in chosen]
    # A block that ends within what was computed under the patch is lent to nobody.
    starts = [found[place]["said"]["patched_from"] for place in chosen]
    assert min(starts) < 128
    for one, start in zip(later, starts, strict=True):
        assert one["said"]["coverage"]["cached"] == start // 128 * 128
        smol.assert_equals(one)
    events = [AuditEvent.model_validate_json(line) for line in (tmp_path / "a").read_text().splitlines()]
    closed = {event.request: event.patched_from for event in events if event.event == "close"}
    said = sorted(found[place]["said"]["patched_from"] for place in chosen)
    assert sorted(start for start in closed.values() if start is not None)[:2] == said


@pytest.mark.parametrize(
    ("engine", "environment", "begin"),
    [
        pytest.param({"enforce_eager": False}, {"VLLM_CPU_CI_ENV": "1"}, "token", id="traced"),
        pytest.param({"second_runner": True}, {}, "token", id="second_runner"),
        pytest.param({"async_scheduling": True}, {}, "token", id="looks_ahead"),
        pytest.param({"async_scheduling": True, "second_runner": True}, {}, "token", id="second_runner_looks_ahead"),
        pytest.param({"async_scheduling": False}, {}, "prompt", id="read_again"),
        pytest.param({"async_scheduling": False, "second_runner": True}, {}, "prompt", id="second_runner_read_again"),
    ],
)
def test_a_patch_outlasts_preemption(
    engine: dict[str, Any],
    environment: dict[str, str],
    begin: str,
    smol: Patched,
    eight: list[list[int]],
    run_engine: Callable[..., Any],
    offline: Offline,
    one_head: Callable[[str, float, float], Path],
) -> None:
    folder = one_head("head0", 1e9, 1e9)
    peaks = sorted(float(offline(folder, ids, len(ids))[0][0]) for ids in eight)
    threshold = (peaks[3] + peaks[4]) / 2
    # Eight requests that want two blocks each in the end, in nine blocks.
    (found,) = run_engine(
        [eight],
        {
            "guard": str(one_head("head0", threshold, threshold)),
            "policy": str(smol.policy if begin == "token" else smol.again),
        },
        {"max_tokens": 16, "ignore_eos": True, "logprobs": 0},
        environment,
        preempts=True,
        num_gpu_blocks_override=10,
        max_num_batched_tokens=256,
        **engine,
    )
    assert 4 <= sum(one["said"]["action"] == "patch" for one in found) < 8
    assert any(one["said"].get("patched_from") == 0 for one in found) is (begin == "prompt")
    for one in found:
        smol.assert_equals(one)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({}, id="first_runner"),
        pytest.param({"second_runner": True}, id="second_runner"),
        pytest.param({"speculative_config": DRAFTS}, id="drafts"),
    ],
)
def test_a_suspected_prompt_is_read_again_from_its_first_token_on(
    engine: dict[str, Any],
    smol: Patched,
    eight: list[list[int]],
    run_engine: Callable[..., Any],
    offline: Offline,
    one_head: Callable[[str, float, float], Path],
) -> None:
    strict = one_head("head0", 1e9, 1e9)
    peaks = [float(offline(strict, ids, len(ids))[0][0]) for ids in eight]
    highest = sorted(peaks)
    threshold = (highest[5] + highest[6]) / 2
    chosen = np.argsort(peaks)[6:].tolist()
    sampling = {"max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    # Prompts come in chunks of 64 rows. The second time they are known to the prefix cache, as read and as read again.
    found, later, single = run_engine(
        [eight, eight, [eight[chosen[0]]]],
        {"guard": str(one_head("head0", threshold, threshold)), "policy": str(smol.again)},
        [sampling, sampling, {**sampling, "max_tokens": 1, "prompt_logprobs": 0}],
        async_scheduling=False,
        preempts=True,
        **engine,
    )
    (plain,) = run_engine([eight], {"guard": str(strict)}, sampling)
    for one in (*found, *later, *single):
        smol.assert_equals(one)
        assert one["said"]["coverage"]["missing"] == 0
    for place, (first, second, before) in enumerate(zip(found, later, plain, strict=True)):
        coverage = first["said"]["coverage"]
        # Of drafts that are accepted, the last may lie past the answer's end.
        spare = coverage["scored"] - len(before["prompt"]) - 11
        assert 0 <= spare <= engine.get("speculative_config", {}).get("num_speculative_tokens", 0)
        # In its answer any may come to be suspected, and is patched from there on.
        starts = {one["said"].get("patched_from", 999) for one in (first, second)}
        assert starts == {0} if place in chosen else min(starts) > len(before["prompt"])
    assert [found[place]["tokens"] for place in chosen] != [plain[place]["tokens"] for place in chosen]
    assert single[0]["tokens"] == found[chosen[0]]["tokens"][:1]
    assert single[0]["said"]["patched_from"] == 0
    assert single[0]["prompt_logprobs"] == len(single[0]["prompt"])


def test_each_of_two_ranks_patches_its_own_neurons(
    even: LoadedModel,
    prompts: list[list[int]],
    run_engine: Callable[..., Any],
    guards: Any,
    tmp_path: Path,
) -> None:
    tiny = patched(even, tmp_path, 1.0)
    guard = random_guard(even, 2, (Site(1, "resid"),))
    always = guard.manifest.detectors[0].model_copy(update={"calibration": guards.calibration(-1e9, -1e9)})
    manifest = guard.manifest.model_copy(update={"detectors": (always, *guard.manifest.detectors[1:])})
    Guard(manifest, guard.probes).save_pretrained(tmp_path / "guard")
    (found,) = run_engine(
        [prompts[:6]],
        {"guard": str(tmp_path / "guard"), "policy": str(tiny.policy)},
        {"ignore_eos": True, "logprobs": 0},
        {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "1"},
        enforce_eager=False,
        model=even.model.name_or_path,
        tensor_parallel_size=2,
    )
    for one in found:
        assert one["said"]["patched_from"] == len(one["prompt"])
        tiny.assert_equals(one)
        plain = tiny.logprobs({**one, "said": {}})
        assert (plain - tiny.logprobs(one))[1:].abs().max() > 1e-2


def test_a_patch_that_does_not_fit_does_not_start(
    smol: Patched, guard: Path, refusals: Callable[..., list[str]], tmp_path: Path
) -> None:
    manifest = smol.live.patch.manifest
    base = manifest.base.model_copy(update={"weight_digest": "0" * 64})
    wrong = dataclasses.replace(smol.live.patch, manifest=manifest.model_copy(update={"base": base}))
    wrong.save_pretrained(tmp_path / "wrong")
    policy = {"rules": [], "on_missing": "patch", "patch": {"folder": str(tmp_path / "wrong")}}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")
    beside = {"guard": str(guard), "policy": str(smol.policy), "allow_uncertified": True}
    again = {"guard": str(guard), "policy": str(smol.again)}
    said, adapters, ahead = refusals(
        ({"guard": str(guard), "policy": str(tmp_path / "policy.yaml")}, {}),
        (beside, {"enable_lora": True}),
        (again, {"async_scheduling": True}),
    )
    assert "serve with --no-async-scheduling, or with patch.begin: token" in ahead
    assert re.search(r"weight_digest is .* expected '0000[^;]*; a patch fits the model", said)
    assert "serve without --enable-lora, or take the action patch out of the policy" in adapters
