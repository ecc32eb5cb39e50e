"""A vLLM server in a process of its own, for as long as a block lasts."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["CONSOLE", "Server", "ask", "server"]

CONSOLE = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    address: str
    """What OpenAI clients take."""
    group: int
    """The process group of all its processes."""

    def seconds(self) -> tuple[float, float]:
        """Return what its workers and its other processes have computed so far, in seconds of a processor.

        Linux tells.
        """
        worker = rest = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                name, _, told = file.read_text(encoding="utf-8").rpartition(") ")
                fields = told.split()
                if int(fields[2]) != self.group:
                    continue
                ticks = int(fields[11]) + int(fields[12])
                if "(VLLM::Worker" in name:
                    worker += ticks
                else:
                    rest += ticks
        second = os.sysconf("SC_CLK_TCK")
        return worker / second, rest / second


@contextmanager
def server(model: str, options: Sequence[str], work: Path, guard: Path | None = None) -> Iterator[Server]:
    """Serve a model for the length of a block.

    Args:
        model: local folder.
        options: of `vllm serve`, and with a guard of `spider-sense serve`.
        work: folder for the log and the compile cache; made.
        guard: folder of the guard, None for a bare server.

    Yields:
        The server, once it takes requests.

    Raises:
        RuntimeError: with the end of the log, if the server does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work.mkdir()
    command: list[str | Path] = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    if guard is not None:
        command = [Path(sys.executable).with_name("spider-sense"), "serve", model, "--guard", guard]
    told = {"VLLM_CACHE_ROOT": str(work / "cache"), "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the command is this file's own
            [*command, "--port", str(port), "--served-model-name", "model", *options],
            env={**os.environ, **told},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, work / "log")
        yield Server(f"http://127.0.0.1:{port}/v1", process.pid)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started, which outlive it if it is killed."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    CONSOLE.print(f"waiting for {address}")
    for _ in range(900):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:  # noqa: S310 - an address of this machine
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


async def ask(client: Any, prompt: str, new_tokens: int, **extra: Any) -> Any:
    """Return the stream of a greedy answer from a server of this module; ``extra`` are options of vLLM's own."""
    return await client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": prompt}],
        stream=True,
        temperature=0.0,
        max_tokens=new_tokens,
        extra_body=extra,
    )
