"""Who mines the model is watched for inside a real vLLM engine: what is read, where it goes, and what comes back."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import get, messages, serving

from spider_sense.chat import unscored
from spider_sense.extraction import Decision, Key, PrincipalState
from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.decision import Level
from spider_sense.extraction.fitting import calibrate, fit
from spider_sense.extraction.layout import SKETCH
from spider_sense.extraction.simulator.noise import noise_rows
from spider_sense.extraction.standing import text_of
from spider_sense.extraction.stores import Entry, open_store
from spider_sense.fingerprint import fingerprint
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.offline import whole_logits
from spider_sense.scoring import Bank, Scorer
from spider_sense.types import Site

pytestmark = pytest.mark.vllm
WIDTH, SITE = 576, Site(16, "resid")
KEY = b"a key for tests, not a secret"
POLICY = {"rules": [], "extraction": {"watch": "observe", "limit": "verify", "act": "stop"}}


@pytest.fixture(scope="module")
def artifact(loaded: LoadedModel) -> Artifact:
    """An extraction guard for SmolLM2 whose numbers come from nowhere."""
    key = Key(KEY)
    fitted = fit(
        noise_rows("a", 40, 40, WIDTH),
        noise_rows("bb", 20, 128, WIDTH, "mining"),
        key,
        SITE,
        width=WIDTH,
        base=fingerprint(loaded),
    )
    return calibrate(fitted, noise_rows("ccc", 40, 20, WIDTH), key)


@pytest.fixture
def settings(artifact: Artifact, guard: Path, tmp_path: Path) -> dict[str, Any]:
    """What the server is told; the store is ``tmp_path/store``."""
    artifact.save_pretrained(tmp_path / "extraction")
    (tmp_path / "key").write_bytes(KEY)
    names = {"detector": "extraction", "key": "key", "store": "store"}
    watch = {name: str(tmp_path / place) for name, place in names.items()}
    (tmp_path / "extraction.yaml").write_text(json.dumps(watch))
    (tmp_path / "policy.yaml").write_text(json.dumps(POLICY))
    return {
        "guard": str(guard),
        "policy": str(tmp_path / "policy.yaml"),
        "extraction": str(tmp_path / "extraction.yaml"),
        "audit": str(tmp_path / "audit.jsonl"),
    }


def as_sent_by(principal: str) -> dict[str, Any]:
    """Return sampling parameters as the front end would have filled them."""
    return {"max_tokens": 3, "extra_args": {"spider_sense_principal": principal}}


def test_what_is_read_in_the_engine_is_what_is_read_offline(
    settings: dict[str, Any],
    artifact: Artifact,
    guard: Path,
    prompts: list[list[int]],
    loaded: LoadedModel,
    run_engine: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Prompts come in chunks, and the second time from the prefix cache; canaries are nobody's."""
    run_engine([prompts, prompts], settings, as_sent_by("team-a"))
    heads = artifact.sketch.heads(artifact.site)
    bank, template = Bank(heads), Guard.from_pretrained(guard).manifest.template
    expected = 0.0
    for ids in prompts:
        scorer = Scorer(bank)
        request = scorer.open("offline", len(ids), unscored(template.head, ids), template.tail)
        scorer.score_sequence(whole_logits(bank, loaded, ids), request)
        expected += 2 * float(np.clip(scorer.stream.readout([request.slot]).numpy()[0, SKETCH], -4, 4))
    store = open_store(str(tmp_path / "store"))
    states = {name: PrincipalState.from_bytes(state) for name, state in store.principals()}
    store.close()
    assert list(states) == ["team-a"]
    state = states["team-a"].states[0]
    assert (state["count"], state["sketched"]) == (24, 24)
    assert state["probe"] == pytest.approx(expected, rel=1e-3, abs=24e-4)


def test_choices_are_one_request_and_each_shows_logits_however_they_are_asked_for(
    settings: dict[str, Any], prompts: list[list[int]], run_engine: Callable[..., Any], tmp_path: Path
) -> None:
    asked = as_sent_by("team-a") | {"n": 3, "temperature": 1.0, "logprob_token_ids": [7, 9]}
    allowed = as_sent_by("team-a") | {"allowed_token_ids": [7, 9], "logprobs": 0}
    run_engine([prompts[:2], prompts[2:3]], settings, [asked, allowed])
    store = open_store(str(tmp_path / "store"))
    state = PrincipalState.from_bytes(store.read("team-a") or b"").states[0]
    store.close()
    assert (state["count"], state["biased_requests"]) == (3, 3)
    assert state["revealed"] == 2 * 2 * 3 * 3 + 1 * 3


def test_a_client_cannot_pass_for_a_choice_or_a_canary(
    settings: dict[str, Any], new_cache: Callable[[], Path], tmp_path: Path
) -> None:
    forged = {"model": "smollm2", "vllm_xargs": {"spider_sense_choice": [1, 2], "spider_sense_canary": True}}
    (said,) = messages(1)

    with serving(tmp_path, new_cache(), settings | {"principal_header": "X-Who"}, "--enforce-eager") as address:

        def ask(path: str, **body: Any) -> None:
            get(f"{address}/v1/{path}", None, forged | body, **{"X-Who": "team-a"})

        for name in ("1_x", "spider_sense canary 0"):
            ask("responses", input=said[0]["content"], max_output_tokens=2, request_id=name)
        ask("chat/completions", messages=said, max_tokens=2, n=3, temperature=1.0)
        assert _requests_of("team-a", tmp_path / "store", 3) == 3
    events = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    opened = [event["request"] for event in events if event["event"] == "open"]
    assert [name.split("-")[0] for name in opened if name.startswith(("1_", "spider_sense canary 0"))] == [
        "spider_sense canary 0", "1_x_0", "spider_sense canary 0_0", "1_chatcmpl"
    ]  # fmt: skip


def test_whoever_is_to_be_answered_without_reasoning_is_so_wherever_there_is_reasoning(
    settings: dict[str, Any], new_cache: Callable[[], Path], tmp_path: Path
) -> None:
    policy = {"rules": [], "extraction": {"limit": "omit_reasoning", "act": "stop"}}
    (tmp_path / "policy.yaml").write_text(json.dumps(policy))
    _find(tmp_path / "store", "limit")
    forced = "Here is my thought process: hidden. Here is my response: shown."
    said = {"model": "smollm2", "structured_outputs": {"choice": [forced]}, "temperature": 0.0}
    (words,), tokens = messages(1), {"max_tokens": 40, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    asked: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": words, **tokens},
        "chat/completions/batch": {"messages": [words, words], **tokens, "logprob_token_ids": [7]},
        "responses": {"input": words[0]["content"], "max_output_tokens": 40, "enable_response_messages": True},
    }
    more = ["--enforce-eager", "--reasoning-parser", "granite", "--structured-outputs-config.enable_in_reasoning=true"]

    with serving(tmp_path, new_cache(), settings | {"principal_header": "X-Who"}, *more) as address:

        def told(who: str) -> list[bool]:
            found = [get(f"{address}/v1/{path}", None, said | body, **{"X-Who": who}) for path, body in asked.items()]
            assert all("shown" in one for one in found)
            return [any(word in one for word in ("hidden", '"token_ids":[', '"top_logprobs":[')) for one in found]

        assert told("team-b") == [True] * 3
        # The first answer after the start is whole.
        assert told("team-a") == [True, False, False]
        assert told("team-a") == [False] * 3


def _requests_of(principal: str, store: Path, wanted: int) -> int:
    """Return how many requests of a principal a server has folded, as soon as they are so many."""
    opened, deadline = open_store(str(store)), time.monotonic() + 30
    count = 0
    while count < wanted and time.monotonic() < deadline:
        state = opened.read(principal)
        count = int(PrincipalState.from_bytes(state).states[0]["count"]) if state else 0
        time.sleep(0.2)
    opened.close()
    return count


def test_what_was_found_comes_back_and_a_client_is_not_told_why(
    settings: dict[str, Any], prompts: list[list[int]], run_engine: Callable[..., Any], tmp_path: Path
) -> None:
    _find(tmp_path / "store", "act")
    asked = as_sent_by("team-a") | {"n": 2, "temperature": 1.0}
    (answers,) = run_engine([prompts[:3]], settings, asked)
    assert len(answers) == 6
    for one in answers:
        assert (one["finish_reason"], one["stop_reason"]) == ("stop", "spider_sense: refused")
        assert (one["said"]["action"], one["said"]["reason"], one["said"]["zone"]) == ("stop", "refused", "clear")
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()}
    assert any("group: the same template from four keys" in (reason or "") for reason in reasons)


def _find(store: Path, level: Level) -> None:
    """Put into a store that team-a was found."""
    found = Decision(
        principal="team-a", level=level, tier="group", score=9.0, threshold=4.0, p_value=0.001, count=64, time=1e9,
        stratum="", certified=True, evidence=("the same template from four keys",),
    )  # fmt: skip
    opened = open_store(str(store))
    opened.update({"team-a": lambda old: Entry(PrincipalState.open(Key(KEY).seed("team-a")).to_bytes())})
    opened.mark_groups({"team-a": text_of(found)})
    opened.close()
