"""Several front ends of one guarded server: counts, answers without scores, slowed principals, a reload over HTTP."""

import hashlib
import json
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import RELOAD_KEY, get, messages, serving, settle

from spider_sense.guard import Guard

pytestmark = pytest.mark.vllm
EXEMPT = hashlib.sha256(b"secret").hexdigest()[:16]
"""Who sends requests with the key "secret"."""


def test_two_front_ends_count_together_show_no_score_and_slow_the_same_principals(
    one_head: Callable[[str, float, float], Path], new_cache: Callable[[], Path], tmp_path: Path
) -> None:
    more = ["--enforce-eager", "--api-server-count", "2", "--api-key", "secret", "other"]
    pace = {"requests": 1, "per_seconds": 600, "for_seconds": 600}
    rules = [{"detector": "*", "zone": "suspect", "action": "throttle"}]
    (tmp_path / "policy.yaml").write_text(json.dumps({"rules": rules, "throttle": pace}))
    settings: dict[str, Any] = {"guard": str(one_head("head0", -1e6, 1e6)), "policy": str(tmp_path / "policy.yaml")}
    settings |= {"exempt_principals": [EXEMPT]}
    with serving(tmp_path, new_cache(), settings, *more) as address:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{address}/v1/guard")
        assert json.loads(get(f"{address}/v1/guard", "secret"))["settings"]["scores"] is False

        def ask(place: int) -> str:
            body = {"model": "smollm2", "messages": messages(8)[place], "max_tokens": 4, "stream": place % 2 == 0}
            return get(f"{address}/v1/chat/completions", "secret", body)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        for answer in answers:
            assert '"spider_sense":{"guard":' in answer
            assert not [word for word in ('score"', "threshold", "margin", "peak") if word in answer]
        found = settle(address, 8)
        assert found["spider_sense_requests_total", "observe"] == 8
        assert found["spider_sense_tokens_total", "scored"] > 0
        assert _said_of_one_that_is_slowed(address) == "throttle"
        assert ask(1)
        _assert_a_reload_is_heard_by_both(address, one_head("head0", -1e6, 2e6), tmp_path / "policy.yaml")
        assert _said_of_one_that_is_slowed(address) == "throttle"


def _assert_a_reload_is_heard_by_both(address: str, guard: Path, policy: Path) -> None:
    url, pace = f"{address}/spider_sense/reload", {"requests": 1, "per_seconds": 599, "for_seconds": 600}
    policy.write_text(json.dumps({**json.loads(policy.read_text()), "throttle": pace}))
    for key, body, status in (("secret", {"guard": str(guard)}, 401), (RELOAD_KEY, {"guard": "nowhere"}, 409)):
        with pytest.raises(urllib.error.HTTPError, match=str(status)):
            get(url, key, body)
    assert json.loads(get(url, RELOAD_KEY, {"guard": str(guard)})) == {"canaries": None}
    time.sleep(1)
    said = [json.loads(get(f"{address}/v1/guard", "secret")) for _ in range(16)]
    digest = Guard.from_pretrained(guard).digest
    assert {(one["guard"]["digest"], one["policy"]["throttle"]["per_seconds"]) for one in said} == {(digest, 599)}
    lines = [line for line in get(f"{address}/metrics").splitlines() if line.startswith("spider_sense_guard_info{")]
    assert [digest in line for line in lines if line.endswith(" 1.0")] == [True]
    assert [digest in line for line in lines if line.endswith(" 0.0")] == [False]


def _said_of_one_that_is_slowed(address: str) -> str:
    """Ask as one whose every request is to be throttled; return the action that the first answer tells of."""
    forged = {"spider_sense_principal": EXEMPT}
    body = {"model": "smollm2", "messages": messages(1)[0], "max_tokens": 2, "vllm_xargs": forged}
    answers: list[dict[str, Any]] = []
    refusals: list[urllib.error.HTTPError] = []
    for _ in range(16):
        try:
            answers.append(json.loads(get(f"{address}/v1/chat/completions", "other", body)))
        except urllib.error.HTTPError as error:
            refusals.append(error)
    # After the first, each of the two lets one in.
    assert 1 < len(answers) <= 3
    for refusal in refusals:
        assert refusal.code == 429
        assert 500 < int(refusal.headers["Retry-After"]) <= 600
        assert json.loads(refusal.read())["error"]["code"] == "rate_limit_exceeded"
    return str(answers[0]["kv_transfer_params"]["spider_sense"]["action"])
