"""transformers' own server under a guard, as its clients see it: verdicts, refusals, clients that leave, closed doors.

Whole servers run in this process on a tiny model, one request at a time and all at once. ``tests/model`` has one in a
process of its own.
"""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.bench import random_patch
from spider_sense.canary import Canaries, Canary
from spider_sense.chat import unscored
from spider_sense.errors import ConfigError, MismatchError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel, load_model
from spider_sense.monitor import Monitor
from spider_sense.offline import whole_logits
from spider_sense.patching import apply_patch
from spider_sense.scoring import Bank, Scorer
from spider_sense.serving.settings import ServingSettings
from spider_sense.types import Site

for name in ("fastapi", "uvicorn", "openai", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed; the extra transformers-serve has it")

NEW = 10
REFUSAL = "w7 w8 w9"
LONG = 100
"""Tokens that nobody waits for."""
TEXTS = [f"w{n} w{n + 1} w{2 * n}" for n in range(8)]
Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def tiny(tiny_loaded: LoadedModel, tmp_path: Path) -> LoadedModel:
    """A tiny model in a folder, its weights scaled up, so that no two hidden states are alike."""
    with torch.no_grad():
        for weight in tiny_loaded.model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    for part in (tiny_loaded.model, tiny_loaded.tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    return load_model(str(tmp_path / "tiny"), "float32")


@pytest.fixture
def serve(tiny: LoadedModel, tmp_path: Path) -> Serve:
    """Return a function that runs a server of the tiny model in a thread, and gives its address."""
    from spider_sense.serving.served import Served
    from spider_sense.serving.transformers_seams import seams

    policy = tmp_path / "policy.yaml"
    policy.write_text(f"rules: []\nrefusal: {REFUSAL}\n")

    @contextmanager
    def run(guard: Guard, packed: bool, **told: Any) -> Iterator[str]:
        guard.save_pretrained(tmp_path / "guard")
        audit = tmp_path / "audit.jsonl"
        served = Served(ServingSettings(guard=tmp_path / "guard", policy=policy, audit=audit, scores=True, **told))
        port = _free_port()
        # All prompts begin with the same block.
        options = {"cb_block_size": 4, "cb_num_blocks": 128, "cb_max_batch_tokens": 64} if packed else {}
        with closing(served), seams(served, tmp_path / "tiny"):
            server = _threaded()("tiny", port=port, continuous_batching=packed, non_blocking=True, **options)
            try:
                _wait(lambda: server.server.started)
                yield f"http://localhost:{port}"
            finally:
                server.server.should_exit = True
                server._thread.join(20)
        assert not server._thread.is_alive()
        events = _events(audit)
        assert {one["request"] for one in events} == {one["request"] for one in events if one["event"] == "close"}

    return run


def _threaded() -> Any:
    from transformers.cli.serve import Serve as Server

    class Threaded(Server):  # type: ignore[misc]
        def start_server(self) -> None:
            """Run in a thread; transformers' own leaves its event loop open."""
            self._thread = threading.Thread(target=self.server.run)
            self._thread.start()

    return Threaded


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(done: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _events(audit: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in audit.read_text().splitlines()]


def _client(address: str) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def _ask(address: str, *many: Any) -> Any:
    """Return what comes of questions that are asked at once, each a function of the client."""

    async def run() -> list[Any]:
        async with _client(address) as client:
            return list(await asyncio.gather(*(one(client) for one in many)))

    return asyncio.run(run())


def _chat(text: str, stream: bool = False, model: str = "tiny", **more: Any) -> Callable[[Any], Any]:
    """Return a question for a chat; what is said comes as (text, verdict, last choice)."""
    options = {"temperature": 0.0, "max_tokens": NEW, **more}

    async def whole(client: Any) -> Any:
        return await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], stream=stream, **options
        )

    async def ask(client: Any) -> tuple[str, Any, Any]:
        answer = await whole(client)
        if not stream:
            return answer.choices[0].message.content, _verdict(answer), answer.choices[0]
        said, chunks = "", [chunk async for chunk in answer]
        for chunk in chunks:
            said += chunk.choices[0].delta.content or ""
        assert not any(map(_verdict, chunks[:-1]))
        return said, _verdict(chunks[-1]), chunks[-1].choices[0]

    return ask


def _verdict(answer: Any) -> Any:
    return ((answer.model_extra or {}).get("kv_transfer_params") or {}).get("spider_sense")


def _offline(loaded: LoadedModel, text: str, new: int = NEW) -> tuple[list[int], list[int]]:
    """Return a prompt as the server renders it, and what the bare model answers."""
    model: Any = loaded.model
    told = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )
    prompt = list(told["input_ids"])
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return prompt, out[0, len(prompt) :].tolist()


def check(loaded: LoadedModel, guard: Guard, text: str, found: tuple[str, Any, Any]) -> None:
    """Compare an answer and its verdict with a plain pass over the tokens of the bare model."""
    said, verdict, _ = found
    prompt, answer = _offline(loaded, text)
    ids = [*prompt, *answer[:-1]]
    assert said.split() == loaded.tokenizer.decode(answer, skip_special_tokens=True).split()
    assert verdict["coverage"] == {"scored": len(ids), "cached": 0, "missing": 0}
    template, bank = guard.manifest.template, Bank(guard.probes)
    scorer = Scorer(bank)
    request = scorer.open("offline", len(prompt), unscored(template.head, prompt), template.tail)
    want_H = scorer.score_sequence(whole_logits(bank, loaded, ids), request)[0]
    found_H = torch.tensor([float(one["score"]) for one in verdict["detectors"].values()])
    assert ((found_H - want_H).abs() / want_H.abs().clamp(min=1.0)).max() <= 1e-5
    assert (verdict["zone"], verdict["action"]) == ("clear", "observe")


def _seeker(guards: Any, tiny: LoadedModel, text: str, step: int) -> Guard:
    """Return a guard that breaches at the step-th token of an answer, and nowhere else."""
    prompt, answer = _offline(tiny, text)
    site = Site.parse("resid.0")
    hidden = guards.hidden_states(tiny.model, [*prompt, *answer], [site])[site]
    probe = guards.seeker("seeker", hidden[len(prompt) + step])
    made: Guard = guards.guard(tiny, [probe], guards.calibration(0.999, 0.999))
    return made


pytestmark = pytest.mark.parametrize("packed", [False, True], ids=["in turn", "packed"])


def test_every_request_gets_its_own_verdict(serve: Serve, guards: Any, tiny: LoadedModel, packed: bool) -> None:
    guard = guards.guard(tiny, guards.many_probes())
    with serve(guard, packed) as address:
        # All of them under one id, and streams beside whole answers.
        same: Any = {"extra_headers": {"X-Request-ID": "mine"}}
        many = [_chat(text, stream=place % 4 > 0, **same) for place, text in enumerate(TEXTS)]
        for text, found in zip(TEXTS * 2, _ask(address, *many) + _ask(address, *many), strict=True):
            check(tiny, guard, text, found)


def test_answers_have_the_names_that_the_audit_log_knows_them_by(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, tmp_path: Path
) -> None:
    async def ask(client: Any) -> Any:
        messages: Any = [{"role": "user", "content": TEXTS[0]}]
        return await client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)

    with serve(guards.guard(tiny, guards.many_probes()), packed) as address:
        names = {answer.id for answer in _ask(address, ask, ask)}
    assert names == {one["request"] for one in _events(tmp_path / "audit.jsonl")}


def test_an_answer_that_no_guard_has_judged_is_an_error(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import APIError

    from spider_sense.serving.served import Served

    made, attach = [], Served.attach

    def attached(served: Served, *args: Any) -> None:
        attach(served, *args)
        made.append(served)

    async def listen(client: Any, said: list[str]) -> None:
        messages, told = [{"role": "user", "content": TEXTS[0]}], {"max_tokens": NEW, "stream": True}
        async for chunk in await client.chat.completions.create(model="tiny", messages=messages, **told):
            said += [chunk.choices[0].delta.content or ""]

    async def fails(client: Any) -> None:
        with pytest.raises(APIError):
            await _chat(TEXTS[0])(client)

    async def fails_as_a_stream(client: Any) -> None:
        said: list[str] = []
        with pytest.raises(APIError):
            await listen(client, said)
        assert not any(said)

    monkeypatch.setattr(Served, "attach", attached)
    guard = guards.guard(tiny, guards.many_probes())
    with serve(guard, packed) as address:
        check(tiny, guard, TEXTS[0], _ask(address, _chat(TEXTS[0]))[0])
        if packed:
            monkeypatch.setattr(Monitor, "continuous", {})
        else:
            made[0].monitor.detach()
        slowed(monkeypatch)  # so that tokens arrive one by one
        _ask(address, fails)
        _ask(address, fails_as_a_stream)


def _get(address: str, path: str = "", body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_a_model_that_scores_otherwise_is_not_served(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, drift: float
) -> None:
    bare = guards.guard(tiny, guards.many_probes())
    prompt = _offline(tiny, TEXTS[5])[0]
    peak = guards.offline_peak(bare, tiny.model, prompt, len(prompt)).tolist()
    scores = tuple(None if score == float("-inf") else score + drift for score in peak)
    canaries = Canaries(prompts=(Canary(tokens=tuple(prompt), scores=scores),), bands=(1e-4,) * len(scores))
    guard = Guard(bare.manifest.model_copy(update={"canaries": canaries}), bare.probes)
    if drift:
        with pytest.raises(MismatchError, match="does not score as the guard was calibrated"), serve(guard, packed):
            pass
        return
    with serve(guard, packed) as address:
        said = json.loads(_get(f"{address}/v1/guard"))
        verdict = _ask(address, _chat(TEXTS[5]))[0][1]
    assert said["canaries"]["accepted"] is True
    assert said["guard"]["digest"] == verdict["guard"]
    assert said["versions"].keys() == {"spider_sense", "transformers"}


@pytest.mark.parametrize("limit", [NEW, 4])
def test_a_stopped_request_ends_with_the_whole_refusal(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, limit: int
) -> None:
    text, step = TEXTS[3], 2
    guard = _seeker(guards, tiny, text, step)
    # Where one request runs at a time its verdict is read one token later.
    kept = _offline(tiny, text)[1][: step + 1 + (not packed)]
    want = f"{tiny.tokenizer.decode(kept, skip_special_tokens=True)} {REFUSAL}"
    with serve(guard, packed) as address:
        stopped = [_chat(text, stream, max_tokens=limit) for stream in (False, True)]
        *found, mate = _ask(address, *stopped, _chat(TEXTS[0], True))
        responses = _ask(address, _respond(text, False, limit), _respond(text, True, limit))
    for said, verdict, choice in found:
        assert said.split() == want.split()
        assert (verdict["zone"], verdict["action"]) == ("breach", "stop")
        assert choice.finish_reason == "stop"
        assert choice.model_extra["stop_reason"].startswith("spider_sense: seeker breach")
    check(tiny, guard, TEXTS[0], mate)
    for answer in responses:
        assert answer.output_text.split() == want.split()
        assert _verdict(answer)["action"] == "stop"


def _respond(text: str, stream: bool, limit: int) -> Callable[[Any], Any]:
    async def ask(client: Any) -> Any:
        options = {"temperature": 0.0, "max_output_tokens": limit, "stream": stream}
        answer = await client.responses.create(model="tiny", input=text, **options)
        return [event async for event in answer][-1].response if stream else answer

    return ask


def test_a_breach_in_the_prompt_is_answered_by_the_refusal_alone(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool
) -> None:
    with serve(_seeker(guards, tiny, TEXTS[1], -2), packed) as address:

        async def complete(client: Any) -> Any:
            prompt = tiny.tokenizer.decode(_offline(tiny, TEXTS[1])[0])
            return await client.completions.create(model="tiny", prompt=prompt, max_tokens=1, temperature=0.0)

        before = _stopped(address)
        found, answer = _ask(address, _chat(TEXTS[1], True), complete)
        _wait(lambda: _stopped(address) == before + 2, 10)
    extra = 0 if packed else 1
    assert found[0].split()[extra:] == REFUSAL.split()
    assert answer.choices[0].text.split()[extra:] == REFUSAL.split()
    assert _verdict(answer)["action"] == answer.choices[0].finish_reason == "stop"


def test_a_request_that_cannot_be_recorded_is_refused_and_the_server_goes_on(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = AuditLog.write, [True]

    def refuse(log: AuditLog, event: AuditEvent) -> None:
        if event.event == "open" and full[0]:
            raise OSError("No space left on device")
        write(log, event)

    monkeypatch.setattr(AuditLog, "write", refuse)
    guard = guards.guard(tiny, guards.many_probes())
    with serve(guard, packed) as address:
        before = _unrecorded(address)
        for said, verdict, choice in _ask(address, *(_chat(TEXTS[1], stream) for stream in (False, True))):
            assert said.split() == REFUSAL.split()
            assert (verdict["action"], choice.finish_reason) == ("stop", "stop")
            assert "could not be recorded" in choice.model_extra["stop_reason"]
        _wait(lambda: _unrecorded(address) == before + 2, 10)
        full[0] = False
        check(tiny, guard, TEXTS[2], _ask(address, _chat(TEXTS[2]))[0])


def _unrecorded(address: str) -> float:
    lines = _get(address, "/metrics").splitlines()
    (line,) = (one for one in lines if one.startswith("spider_sense_unrecorded_events_total "))
    return float(line.split()[-1])


def _stopped(address: str) -> float:
    """Return how many requests the metrics say were stopped."""
    (line,) = (one for one in _get(address, "/metrics").splitlines() if 'requests_total{action="stop"}' in one)
    return float(line.split()[-1])


def test_a_prompt_is_read_again_in_turn_and_refused_otherwise(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, tmp_path: Path
) -> None:
    patch = random_patch(tiny, scale=1.0).save_pretrained(tmp_path / "patch")
    section = f"{{folder: {tmp_path / 'patch'}, begin: prompt}}"
    rule = "{detector: '*', zone: suspect, action: patch}"
    (tmp_path / "policy.yaml").write_text(f"rules: [{rule}]\npatch: {section}\n")
    probe = guards.probe("all", "mean", "resid.0")
    guard = guards.guard(tiny, [probe], guards.calibration(-1e6, 2e6))
    if packed:
        with pytest.raises(ConfigError, match="without --continuous-batching"), serve(guard, packed):
            pass
        return
    with serve(guard, packed) as address:
        ((said, verdict, _),) = _ask(address, _chat(TEXTS[0]))
    assert (verdict["action"], verdict["patched_from"]) == ("patch", 0)
    change = apply_patch(tiny, patch)
    want = tiny.tokenizer.decode(_offline(tiny, TEXTS[0])[1], skip_special_tokens=True)
    change.revert()
    assert said.split() == want.split()
    assert said.split() != tiny.tokenizer.decode(_offline(tiny, TEXTS[0])[1], skip_special_tokens=True).split()


def test_a_request_ends_when_its_client_leaves(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = (text for text in TEXTS if len(_offline(tiny, text, LONG)[1]) == LONG)

    async def leaves_a_stream(client: Any) -> None:
        messages = [{"role": "user", "content": first}]
        options = {"temperature": 0.0, "max_tokens": LONG}
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True, **options)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                await stream.close()
                return

    async def leaves(client: Any) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_chat(second, max_tokens=LONG)(client), 0.5)

    guard = guards.guard(tiny, guards.many_probes())
    with serve(guard, packed) as address:
        with monkeypatch.context() as patched:
            slowed(patched)
            *_, stays = _ask(address, leaves_a_stream, leaves, _chat(TEXTS[2], True))
        check(tiny, guard, TEXTS[2], stays)
        # Nothing else is asked, and still they are closed.

        def closed() -> list[dict[str, Any]]:
            return [one for one in _events(tmp_path / "audit.jsonl") if one["event"] == "close"]

        _wait(lambda: len(closed()) == 3, 10)
        assert all(one["coverage"]["scored"] < LONG for one in closed())


def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pass through the model take a while."""
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        time.sleep(0.03)
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaModel, "forward", slow)


def test_there_is_no_way_past_the_guard(
    serve: Serve, guards: Any, tiny: LoadedModel, packed: bool, tmp_path: Path
) -> None:
    def refused(path: str, **body: Any) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as error:
            _get(address, path, body)
        return error.value.code, error.value.read().decode()

    guard = guards.guard(tiny, guards.many_probes())
    with serve(guard, packed, principal_header="X-Principal") as address:
        chat = {"messages": [{"role": "user", "content": "w1"}]}
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/completions", {"prompt": "w1"}),
            ("/v1/responses", {"input": "w1"}),
        ):
            assert refused(path, model="other", **body)[0] == 400
            for config in ({"num_beams": 2}, {"cache_implementation": "paged"}, {"num_return_sequences": 2}):
                code, said = refused(path, model="tiny", generation_config=json.dumps(config), **body)
                assert (code, next(iter(config)) in said) == (400, True)
        for told in ({"chat_template": "w1"}, [["chat_template", "w1"]], {"truncation": True}):
            assert refused("/v1/chat/completions", chat_template_kwargs=told, **chat)[0] == 400
        assert refused("/v1/chat/completions", n=2, **chat)[0] == 400
        assert refused("/v1/chat/completions", messages=[])[0] == 400
        if packed:
            long = {"prompt": "w1 " * 500, "max_tokens": 100}
            assert "do not fit the 512 of the KV cache" in refused("/v1/completions", **long)[1]
            unbounded = {"prompt": "w1", "generation_config": "{}"}
            assert "nothing bounds the answer" in refused("/v1/completions", **unbounded)[1]
        assert refused("/v1/completions", prompt="")[0] == 400
        for path in ("/reset", "/v1/audio/transcriptions", "/anything"):
            code, said = refused(path, model="tiny")
            assert (code, f"{path} is not served under a guard" in said) == (404, True)
        assert refused("/load_model", model="other")[0] == 404
        assert '"ready"' in _get(address, "/load_model", {"model": "tiny"})
        assert [one["id"] for one in json.loads(_get(address, "/v1/models"))["data"]] == ["tiny"]
        # What only chooses among tokens may be set, and the guard is there as before.
        harmless = {"generation_config": json.dumps({"max_new_tokens": NEW, "do_sample": False, "num_beams": None})}
        named: Any = {"extra_body": harmless, "extra_headers": {"X-Principal": "team-a"}}
        check(tiny, guard, TEXTS[4], _ask(address, _chat(TEXTS[4], **named))[0])
    assert {one["principal"] for one in _events(tmp_path / "audit.jsonl")} == {"team-a"}
