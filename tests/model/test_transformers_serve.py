"""`spider-sense serve --engine transformers` with SmolLM2, in a process of its own."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from spider_sense.bench import random_guard
from spider_sense.chat import unscored
from spider_sense.corpus import load_corpus
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel, load_model
from spider_sense.offline import whole_logits
from spider_sense.scoring import Bank, Scorer
from spider_sense.training.canaries import make_canaries
from spider_sense.training.train import default_sites

pytestmark = pytest.mark.model
NEW = 6
PROGRAM = [sys.executable, "-c", "from spider_sense.cli import main; main()"]


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2", "float32")


@pytest.fixture(scope="module")
def guard(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bare = random_guard(smollm2, 16, default_sites(smollm2.model)[:2])
    folder = tmp_path_factory.mktemp("guard")
    manifest = bare.manifest.model_copy(update={"canaries": make_canaries(smollm2, bare.probes)})
    Guard(manifest, bare.probes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, which is told to end as an operator does."""
    for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
        pytest.importorskip(package, reason=f"{package} is not installed; the extra transformers-serve has it")
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--engine", "transformers", "--guard", str(guard), "--scores", "--audit", "audit.jsonl"]
    command = [*PROGRAM, "serve", "smollm2", *options, "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    address = f"http://localhost:{port}"
    deadline = time.monotonic() + 120
    while not _is_up(address):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text()[-4000:])
        time.sleep(0.2)
    yield address
    process.terminate()
    process.wait(30)
    events = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert sorted(one["event"] for one in events) == ["close"] * 4 + ["open"] * 4


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _said(address: str, text: str, stream: bool) -> tuple[str, dict[str, Any]]:
    """Return an answer and its verdict."""
    from openai import OpenAI

    asked: Any = {"model": "smollm2", "messages": [{"role": "user", "content": text}], "max_tokens": NEW}
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(**asked, temperature=0.0, stream=stream)
        chunks = list(answer) if stream else []
    last = chunks[-1] if stream else answer
    content = "".join(one.choices[0].delta.content or "" for one in chunks)
    verdict: dict[str, Any] = last.model_extra["kv_transfer_params"]["spider_sense"]
    return content if stream else answer.choices[0].message.content, verdict


def test_verdicts_are_those_of_a_plain_pass(server: str, smollm2: LoadedModel, guard: Path) -> None:
    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday"][:4]
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(_said, server, text, place < 3) for place, text in enumerate(texts)]
        found = [one.result() for one in asked]
    which, model, tokenizer = Guard.from_pretrained(guard), smollm2.model, smollm2.tokenizer
    bank, template = Bank(which.probes), which.manifest.template
    for text, (said, verdict) in zip(texts, found, strict=True):
        told = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
        prompt = list(told["input_ids"])
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[0]
        read = out[:-1].tolist()
        assert said == tokenizer.decode(out[len(prompt) :], skip_special_tokens=True)
        assert verdict["coverage"] == {"scored": len(read), "cached": 0, "missing": 0}
        scorer = Scorer(bank)
        request = scorer.open("offline", len(prompt), unscored(template.head, prompt), template.tail)
        want_H = scorer.score_sequence(whole_logits(bank, smollm2, read), request)[0]
        found_H = torch.tensor([float(one["score"]) for one in verdict["detectors"].values()])
        assert ((found_H - want_H).abs() / want_H.abs().clamp(min=1.0)).max() <= 1e-5
    with urllib.request.urlopen(f"{server}/v1/guard", timeout=10) as answer:
        assert json.loads(answer.read())["canaries"]["accepted"] is True
