"""`spider-sense serve`, as clients see it: many streams at once, whole answers, clients that hang up.

And as an operator sees it: metrics, spans, which guard is in force. The server is compiled and takes prompts in chunks;
its guard is a trained one and 64 random heads beside it.
"""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import get, messages, metrics, requests_ended, serving, settle

from spider_sense.calibration import zone
from spider_sense.chat import Chat
from spider_sense.corpus import load_corpus
from spider_sense.guard import Detector, Guard
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.training.canaries import make_canaries

pytestmark = pytest.mark.vllm
NEW = 16
CHUNK = 64
"""Tokens of a step."""
ENDLESS = 800
"""Tokens that nobody waits for: a request of so many ends early only if the engine hears that its client has left."""
GREETING = "Hi."
"""Nothing else that is asked has as few tokens behind the chat template."""
ACTIONS = {"clear": "observe", "suspect": "flag", "breach": "stop"}
"""What the default policy does in each zone."""
REFUSAL = "I can't help with that."
SECONDS = ("spider_sense_host_seconds_total",)


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A receiver of traces: its address, and what it has been sent."""
    sent: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{receiver.server_port}/v1/traces", sent
        receiver.shutdown()


@pytest.fixture(scope="module")
def greeted(
    loaded: LoadedModel, guard: Path, offline: Callable[..., Any]
) -> tuple[list[int], list[int], int, Detector]:
    """The prompt of the greeting, its answer, and a detector that finds a breach after some of the answer's tokens.

    Prompts of any other length it finds clear.
    """
    prompt = list(Chat(loaded.tokenizer).render(GREETING).ids)
    model: Any = loaded.model
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
    _, trace_TH = offline(guard, [*prompt, *answer[:-1]], len(prompt))
    # Row 0 is the prompt's last, row n is that of the answer's n-th token.
    before_RH = trace_TH[len(prompt) - 1 :].cummax(0).values
    rise_RH = before_RH.diff(dim=0)[2:9]
    answered, head = divmod(int(rise_RH.argmax()), rise_RH.shape[1])
    threshold = float(before_RH[answered + 2 : answered + 4, head].mean())
    detector = Guard.from_pretrained(guard).manifest.detectors[head]
    (usual,) = detector.calibration.buckets[-1:]
    here = {"max_tokens": len(prompt), "suspect": usual.suspect.model_copy(update={"value": threshold})}
    buckets = (
        usual.model_copy(update={"max_tokens": len(prompt) - 1}),
        usual.model_copy(update={**here, "breach": usual.breach.model_copy(update={"value": threshold})}),
        usual,
    )
    calibration = detector.calibration.model_copy(update={"buckets": buckets})
    return prompt, answer, answered + 3, detector.model_copy(update={"calibration": calibration})


@pytest.fixture(scope="module")
def served(
    trained: Guard, guard: Path, greeted: Any, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The trained guard's detector and 64 random ones, one of them that of the greeting."""
    whole = Guard.from_pretrained(guard)
    others = [greeted[-1] if one.name == greeted[-1].name else one for one in whole.manifest.detectors]
    probes = (*trained.probes, *whole.probes)
    told = {"detectors": (*trained.manifest.detectors, *others), "canaries": make_canaries(loaded, probes)}
    folder = tmp_path_factory.mktemp("served")
    Guard(whole.manifest.model_copy(update=told), probes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(
    served: Path,
    new_cache: Callable[[], Path],
    collector: tuple[str, list[bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path]]:
    """Its address, and the audit log."""
    folder = tmp_path_factory.mktemp("server")
    settings = {"guard": str(served), "scores": True, "audit": str(folder / "audit.jsonl")}
    settings |= {"principal_header": "X-Principal", "exempt_principals": ["red-team"]}
    more = ["--otlp-traces-endpoint", collector[0], "--max-num-batched-tokens", str(CHUNK)]
    with serving(folder, new_cache(), settings, *more) as address:
        yield address, folder / "audit.jsonl"


def _client(address: str) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


async def _stream(client: Any, messages: list[dict[str, str]], leave_after: int | None = None) -> dict[str, Any]:
    """Return the verdict of a stream, with the tokens of prompt and answer."""
    stream = await client.chat.completions.create(
        model="smollm2",
        messages=messages,
        stream=True,
        temperature=0.0,
        max_tokens=NEW if leave_after is None else ENDLESS,
        extra_body={"return_token_ids": True, "ignore_eos": leave_after is not None},
    )
    answer: dict[str, Any] = {"prompt": [], "tokens": [], "text": "", "said": None, "finish": None, "stop": None}
    chunks = 0
    async for chunk in stream:
        extra, chunks = chunk.model_extra or {}, chunks + 1
        answer["prompt"] = extra.get("prompt_token_ids") or answer["prompt"]
        for choice in chunk.choices:
            more = choice.model_extra or {}
            answer["tokens"] += more.get("token_ids") or []
            answer["text"] += choice.delta.content or ""
            answer["finish"] = choice.finish_reason or answer["finish"]
            answer["stop"] = more.get("stop_reason") or answer["stop"]
        answer["said"] = (extra.get("kv_transfer_params") or {}).get("spider_sense", answer["said"])
        if leave_after is not None and chunks >= leave_after:
            await stream.close()
            break
    return answer


def _streams(address: str, messages: Sequence[list[dict[str, str]]]) -> list[dict[str, Any]]:
    """Return what comes of streams that are asked for at once."""

    async def run() -> list[dict[str, Any]]:
        async with _client(address) as client:
            return list(await asyncio.gather(*(_stream(client, one) for one in messages)))

    return asyncio.run(run())


def assert_equals_offline(one: dict[str, Any], guard: Path, offline: Callable[..., Any]) -> None:
    """Compare scores, zones and the action with those of a plain pass over the same tokens."""
    coverage, length = one["said"]["coverage"], len(one["prompt"])
    count = coverage["scored"] + coverage["cached"]
    assert coverage["missing"] == 0
    want_H, _ = offline(guard, (one["prompt"] + one["tokens"])[:count], length)
    found_H = torch.tensor([float(found["score"]) for found in one["said"]["detectors"].values()])
    assert ((found_H - want_H).abs() / want_H.abs().clamp(min=1.0)).max() <= 1e-4
    buckets = [one.calibration.thresholds(length) for one in Guard.from_pretrained(guard).manifest.detectors]
    zones = [zone(score, bucket) for score, bucket in zip(want_H.tolist(), buckets, strict=True)]
    assert [found["zone"] for found in one["said"]["detectors"].values()] == zones
    worst = max(zones, key=list(ACTIONS).index)
    assert (one["said"]["zone"], one["said"]["action"]) == (worst, ACTIONS[worst])


def test_sixteen_streams_at_once_get_their_own_verdicts(
    server: tuple[str, Path], served: Path, offline: Callable[..., Any]
) -> None:
    found = _streams(server[0], messages(16))
    assert len({tuple(one["prompt"]) for one in found}) == 16
    assert any(len(one["prompt"]) > CHUNK for one in found), "a prompt comes in chunks"
    for one in found:
        assert_equals_offline(one, served, offline)


def test_misuse_is_stopped_and_its_batch_mates_are_not(
    server: tuple[str, Path], served: Path, offline: Callable[..., Any]
) -> None:
    misuse = [row.text for row in load_corpus() if row.label == "harmful"][::75]
    found = _streams(server[0], [[{"role": "user", "content": text}] for text in misuse] + messages(8))
    for one in found:
        assert_equals_offline(one, served, offline)
    stopped = [one for one in found if one["said"]["action"] == "stop"]
    assert len(stopped) >= 4, "the guard was trained"
    assert sum(one["said"]["action"] == "stop" for one in found[len(misuse) :]) <= 1
    for one in stopped:
        assert (one["finish"], one["text"]) == ("stop", REFUSAL)
        assert one["stop"].startswith("spider_sense: misuse breach")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_misuse_is_refused_where_the_prompt_is_echoed_with_its_log_probabilities(
    stream: bool, server: tuple[str, Path], loaded: LoadedModel
) -> None:
    misuse = [row.text for row in load_corpus() if row.label == "harmful"][::75]
    prompts = [list(Chat(loaded.tokenizer).render(text).ids) for text in misuse]
    answers = asyncio.run(_echoed(server[0], prompts, stream))
    stopped = [one for one in answers if one["said"]["action"] == "stop"]
    assert len(stopped) >= 4, "the guard was trained"
    for one in stopped:
        assert one["text"].endswith(REFUSAL)
        length = len(one["prompt"])
        assert one["logprobs"][:length] == [None] * length
        assert set(one["logprobs"][length:]) == {0.0}
    for one in answers:
        assert one["said"]["action"] == "stop" or None not in one["logprobs"][1:]


async def _echoed(address: str, prompts: Sequence[list[int]], stream: bool) -> list[dict[str, Any]]:
    # What is drawn at random may breach where the prompt did not, after the prompt's log-probabilities were told.
    asked: dict[str, Any] = {"model": "smollm2", "echo": True, "logprobs": 1, "max_tokens": 2, "temperature": 0.0}

    async def ask(client: Any, prompt: list[int]) -> dict[str, Any]:
        answer = await client.completions.create(prompt=prompt, stream=stream, **asked)
        one: dict[str, Any] = {"prompt": prompt, "text": "", "logprobs": [], "said": None}
        for part in [chunk async for chunk in answer] if stream else [answer]:
            one["said"] = ((part.model_extra or {}).get("kv_transfer_params") or {}).get("spider_sense", one["said"])
            for choice in part.choices:
                one["text"] += choice.text
                one["logprobs"] += choice.logprobs.token_logprobs
        return one

    async with _client(address) as client:
        return list(await asyncio.gather(*(ask(client, prompt) for prompt in prompts)))


def test_a_stream_is_stopped_in_the_middle(
    server: tuple[str, Path], served: Path, greeted: Any, loaded: LoadedModel, offline: Callable[..., Any]
) -> None:
    prompt, answer, answered, detector = greeted
    greeting = [{"role": "user", "content": GREETING}]
    one, *others = _streams(server[0], [greeting, *messages(8)])
    assert one["prompt"] == prompt
    assert 3 <= answered < NEW
    assert one["tokens"][:answered] == answer[:answered]
    assert one["said"]["coverage"] == {"scored": len(prompt) + answered, "cached": 0, "missing": 0}
    assert one["text"] == f"{loaded.tokenizer.decode(answer[:answered])}\n\n{REFUSAL}"
    assert (one["finish"], one["said"]["zone"]) == ("stop", "breach")
    assert one["stop"].startswith(f"spider_sense: {detector.name} breach")
    assert all(len(other["tokens"]) > answered for other in others)
    for other in (one, *others):
        assert_equals_offline(other, served, offline)


def test_a_prompt_that_lies_in_the_cache_gets_the_verdict_that_it_got_cold(
    server: tuple[str, Path], served: Path, offline: Callable[..., Any]
) -> None:
    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday"][::-1]
    messages = [[{"role": "user", "content": " ".join(texts[n : n + 10])}] for n in range(2)]
    cold, warm = _streams(server[0], messages), _streams(server[0], messages)
    for first, second in zip(cold, warm, strict=True):
        assert first["said"]["coverage"]["cached"] == 0
        assert second["said"]["coverage"]["cached"] == (len(first["prompt"]) - 1) // 128 * 128 > 0
        assert_equals_offline(first, served, offline)
        assert_equals_offline(second, served, offline)


def test_a_client_that_hangs_up_disturbs_no_other(
    server: tuple[str, Path], served: Path, offline: Callable[..., Any]
) -> None:
    async def run() -> list[dict[str, Any]]:
        async with _client(server[0]) as client:
            leaving = [2 if place % 2 else None for place in range(8)]
            streams = (_stream(client, m, leave) for m, leave in zip(messages(8), leaving, strict=True))
            return list(await asyncio.gather(*streams))

    before = {event["request"] for event in _events(server[1])}
    found = asyncio.run(run())
    assert [one["said"] is None for one in found] == [bool(place % 2) for place in range(8)]
    for one in found[::2]:
        assert_equals_offline(one, served, offline)
    opened = {event["request"] for event in _events(server[1]) if event["event"] == "open"} - before
    assert len(opened) == 8
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        # A request is closed with the step after its end.
        asyncio.run(_one(server[0]))
        closed = {event["request"]: event["coverage"] for event in _events(server[1]) if event["event"] == "close"}
        if opened <= closed.keys():
            assert all(closed[name]["scored"] < ENDLESS // 2 for name in opened)
            return
    raise AssertionError("a request was opened and never closed")


def _events(audit: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in audit.read_text().splitlines()]


async def _one(address: str) -> Any:
    async with _client(address) as client:
        return await client.chat.completions.create(model="smollm2", messages=messages(1)[0], max_tokens=4)


def test_a_whole_answer_carries_the_verdict(server: tuple[str, Path]) -> None:
    answer = asyncio.run(_one(server[0]))
    said = answer.model_extra["kv_transfer_params"]["spider_sense"]
    assert (said["zone"], said["action"]) == ("clear", "observe")
    assert said["coverage"]["missing"] == 0


def _expected(verdicts: list[dict[str, Any]]) -> Counter[tuple[str, ...]]:
    """Return what verdicts with scores add to the metrics."""
    want: Counter[tuple[str, ...]] = Counter()
    for said in verdicts:
        want["spider_sense_requests_total", said["action"]] += 1
        for state, tokens in said["coverage"].items():
            want["spider_sense_tokens_total", state] += tokens
        for name, one in said["detectors"].items():
            want["spider_sense_detector_requests_total", name, one["zone"]] += 1
            want["spider_sense_peak_margin_logits_bucket", name, "0.0"] += one["score"] - one["threshold"] <= 0
            want["spider_sense_peak_margin_logits_bucket", name, "-8.0"] += one["score"] - one["threshold"] <= -8
            want["spider_sense_peak_margin_logits_count", name] += 1
    return want


def test_the_metrics_say_what_the_verdicts_said(server: tuple[str, Path], served: Path) -> None:
    async def run(*leaving: int | None) -> list[dict[str, Any]]:
        async with _client(server[0]) as client:
            streams = (_stream(client, m, leave) for m, leave in zip(messages(len(leaving)), leaving, strict=True))
            return list(await asyncio.gather(*streams))

    before = metrics(server[0])
    found = asyncio.run(run(*[None] * 6))
    after = settle(server[0], requests_ended(before) + 6)
    want = _expected([one["said"] for one in found])
    assert {key: after[key] - before[key] for key in want} == dict(want)
    assert after[SECONDS] > before[SECONDS] > 0
    digests = {key[1:3] for key in after if key[0] == "spider_sense_guard_info"}
    assert digests == {(Guard.from_pretrained(served).digest, Policy.default().digest)}
    # Who hangs up is counted too, although nobody asks for anything afterwards.
    assert all(one["said"] is None for one in asyncio.run(run(2, 2)))
    assert requests_ended(settle(server[0], requests_ended(after) + 2)) == requests_ended(after) + 2


def test_an_operator_can_ask_which_guard_is_in_force(server: tuple[str, Path], served: Path) -> None:
    said, whole = json.loads(get(f"{server[0]}/v1/guard")), Guard.from_pretrained(served)
    assert (said["guard"]["name"], said["guard"]["digest"]) == (served.name, whole.digest)
    assert [one["name"] for one in said["guard"]["detectors"]] == [one.name for one in whole.manifest.detectors]
    assert [one["thresholds"][-1]["breach"] for one in said["guard"]["detectors"]] == [
        one.calibration.buckets[-1].breach.value for one in whole.manifest.detectors
    ]
    actions = {"digest": Policy.default().digest, "actions": ["observe", "flag", "stop"]}
    assert said["policy"] == {**actions, **Policy.default().model_dump(mode="json")}
    assert said["canaries"]["accepted"] is True
    assert 0 <= said["canaries"]["difference"] <= said["canaries"]["band"]
    assert (said["settings"]["guard"], said["settings"]["scores"]) == (str(served), True)
    assert said["versions"]["vllm"].startswith("0.32")


def test_spans_carry_the_verdict(server: tuple[str, Path], collector: tuple[str, list[bytes]]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    said = asyncio.run(_one(server[0])).model_extra["kv_transfer_params"]["spider_sense"]
    want = (said["guard"], "clear", "observe", said["coverage"]["scored"])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        exports = [ExportTraceServiceRequest.FromString(body) for body in list(collector[1])]
        spans = [span for one in exports for part in one.resource_spans for s in part.scope_spans for span in s.spans]
        found = [{item.key: item.value for item in span.attributes} for span in spans if span.name == "llm_request"]
        told = {
            (
                *(one[f"spider_sense.{name}"].string_value for name in ("guard", "zone", "action")),
                one["spider_sense.coverage.scored"].int_value,
            )
            for one in found
            if "spider_sense.guard" in one
        }
        if want in told:
            return
        time.sleep(0.2)
    raise AssertionError(f"{want} is not among {told}")


def test_the_audit_log_names_who_the_proxy_says_and_nobody_else(server: tuple[str, Path]) -> None:
    body = {"model": "smollm2", "messages": messages(1)[0], "max_tokens": 2}
    forged = {"vllm_xargs": {"spider_sense_principal": "red-team"}, "user": "red-team"}
    said = {
        name: json.loads(get(f"{server[0]}/v1/chat/completions", None, body | more, **headers))
        for name, more, headers in (
            ("team-a", forged, {"X-Principal": "team-a"}),
            ("team-b", {**forged, "n": 2}, {"X-Principal": "team-b"}),
            ("unknown", forged, {}),
            ("red-team", {}, {"X-Principal": "red-team"}),
        )
    }
    names = {one["id"]: name for name, one in said.items()}
    events = [json.loads(line) for line in server[1].read_text().splitlines()]
    for answer, name in names.items():
        found = [one["principal"] for one in events if one["event"] == "open" and answer in one["request"]]
        assert found == [name] * (2 if name == "team-b" else 1)
    exempt = {
        name: "its principal is exempt" in one["kv_transfer_params"]["spider_sense"]["reason"]
        for name, one in said.items()
    }
    assert exempt == {"team-a": False, "team-b": False, "unknown": False, "red-team": True}


def _add(found: dict[int, dict[str, Any]], part: Any) -> None:
    """Take the choices of an answer, or of a chunk of one, with what is said of those that end."""
    extra = part.model_extra or {}
    said = (extra.get("kv_transfer_params") or {}).get("spider_sense")
    for choice in part.choices:
        one = found.setdefault(choice.index, {"prompt": [], "tokens": [], "said": None})
        own = choice.model_extra or {}
        one["prompt"] = one["prompt"] or own.get("prompt_token_ids") or extra.get("prompt_token_ids") or []
        one["tokens"] += own.get("token_ids") or []
        if choice.finish_reason is not None:
            assert said is not None
            one["said"] = said["choices"][choice.index] if "choices" in said else said


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompts", [1, 2], ids=["chat", "completions"])
def test_each_choice_carries_its_own_verdict(
    prompts: int, stream: bool, server: tuple[str, Path], served: Path, offline: Callable[..., Any]
) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "n": 3, "temperature": 1.0, "max_tokens": NEW, "stream": stream}
    asked["extra_body"] = {"return_token_ids": True}
    found: dict[int, dict[str, Any]] = {}

    async def run() -> None:
        async with _client(server[0]) as client:
            if prompts == 1:
                answer = await client.chat.completions.create(messages=messages(3)[2], **asked)
            else:
                texts = ["The sea is calm this morning, and", "Once upon a time there was"]
                answer = await client.completions.create(prompt=texts, **asked)
            if not stream:
                _add(found, answer)
                return
            async for chunk in answer:
                _add(found, chunk)

    asyncio.run(run())
    assert sorted(found) == list(range(3 * prompts))
    for index, one in found.items():
        one["prompt"] = one["prompt"] or found[index // 3 * 3]["prompt"] or found[0]["prompt"]
        assert_equals_offline(one, served, offline)
    assert len({tuple(one["tokens"]) for one in found.values()}) == 3 * prompts


def test_an_answer_that_ends_at_a_stop_string_carries_the_verdict(server: tuple[str, Path]) -> None:
    async def run() -> Any:
        async with _client(server[0]) as client:
            asked = {"model": "smollm2", "messages": messages(1)[0], "max_tokens": NEW, "temperature": 0.0}
            text = (await client.chat.completions.create(**asked)).choices[0].message.content
            return await client.chat.completions.create(**asked, stop=text.split()[3])

    answer = asyncio.run(run())
    assert answer.choices[0].model_extra["stop_reason"] is not None
    assert answer.model_extra["kv_transfer_params"]["spider_sense"]["zone"] == "clear"
