"""What a guard costs a vLLM server: a bare and a guarded one side by side, loaded in turn.

    python bench/serving.py --guard random

All servers run all the time, and all but one of them idle; each round sends the same requests to every one, in changing
order, so that what else the machine does falls on all. A second bare server tells what a difference means: `control`
holds its ratios to the first. Run it in the environment of vLLM. The last line is JSON; `*_interval` are 95% bootstrap
intervals over rounds of the median ratio above them.
"""

import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from _server import CONSOLE, Server, ask, server

from spider_sense.bench import random_guard
from spider_sense.intervals import ratio_of_rounds
from spider_sense.models import load_model
from spider_sense.types import Site

PROMPTS = (
    "Describe a quiet morning by the sea for somebody who has never been there.",
    "What should I think of when I plan a small vegetable garden on a balcony?",
    "Explain how a bicycle stays upright, in words that a child understands.",
    "Write a letter to a neighbour about a party on Saturday.",
)
FIGURES = {
    "throughput": "tokens_per_s",
    "ttft": "first_ms",
    "itl": "between_ms",
    "worker_cpu": "worker_s",
    "front_cpu": "front_s",
}


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of requests took."""

    tokens_per_s: float
    first_ms: float
    """Median time to the first token."""
    between_ms: float
    """Median time between tokens."""
    worker_s: float
    """Processor time of the worker, which what else the machine does hardly changes."""
    front_s: float
    """Processor time of the front end and the scheduler."""


def main(
    model: Annotated[str, typer.Option(help="Local folder of a model; smollm2 is the packaged one.")] = "smollm2",
    guard: Annotated[str, typer.Option(help="Folder of a guard, or random: 64 heads at 8 sites.")] = "random",
    concurrent: Annotated[int, typer.Option(help="Requests of a round, all at once.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of each server.")] = 70,
    eager: Annotated[bool, typer.Option(help="Serve without torch.compile.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
) -> None:
    """Measure throughput, time to the first token and time between tokens, guarded over bare."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder, guard_folder = _prepare(model, guard, dtype, work)
        options = ["--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", str(concurrent)]
        options += ["--enforce-eager"] if eager else []
        waiting = {
            "bare": server(folder, options, work / "bare"),
            "guarded": server(folder, options, work / "guarded", guard_folder),
            "bare_again": server(folder, options, work / "bare_again"),
        }
        with ThreadPoolExecutor(len(waiting)) as pool:
            servers = dict(zip(waiting, pool.map(stack.enter_context, waiting.values()), strict=True))
        found = _measure(servers, concurrent, new_tokens, rounds)
    report: dict[str, Any] = {
        "model": model,
        "guard": guard,
        "concurrent": concurrent,
        "new_tokens": new_tokens,
        "eager": eager,
        "dtype": dtype,
        "rounds": rounds,
        "control": _ratios(found["bare"], found["bare_again"]),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    for figure in FIGURES.values():
        report[figure] = {
            name: round(statistics.median(getattr(one, figure) for one in results), 2)
            for name, results in found.items()
        }
    typer.echo(json.dumps(report | _ratios(found["bare"], found["guarded"])))


def _prepare(model: str, guard: str, dtype: str, work: Path) -> tuple[str, Path]:
    """Return the folders of model and guard."""
    loaded = load_model(model, dtype)
    folder = str(loaded.model.name_or_path)
    if guard != "random":
        return folder, Path(guard).resolve()
    layers = loaded.model.config.num_hidden_layers
    sites = tuple(Site(place * layers // 8, "resid") for place in range(8))
    random_guard(loaded, 64, sites).save_pretrained(work / "guard")
    return folder, work / "guard"


def _measure(servers: Mapping[str, Server], concurrent: int, new_tokens: int, rounds: int) -> dict[str, list[Round]]:
    """Load the servers one after the other, round by round."""
    found: dict[str, list[Round]] = {name: [] for name in servers}
    for index in range(-2, rounds):
        # Each comes first, in the middle and last equally often.
        shift = index % len(servers)
        for name in (*list(servers)[shift:], *list(servers)[:shift])[:: 1 if index % 2 else -1]:
            result = asyncio.run(_load(servers[name], concurrent, new_tokens))
            if index >= 0:  # the rounds before warm up
                found[name].append(result)
        if index >= 0:
            told = ", ".join(f"{name} {results[-1].tokens_per_s:.0f}" for name, results in found.items())
            CONSOLE.print(f"round {index + 1} of {rounds}, tokens/s: {told}")
    return found


def _ratios(bare: Sequence[Round], other: Sequence[Round]) -> dict[str, Any]:
    """Return the median of the ratios of each round, with its interval, for every figure."""
    report: dict[str, Any] = {}
    for key, figure in FIGURES.items():
        ratio, interval = ratio_of_rounds([getattr(b, figure) for b in other], [getattr(a, figure) for a in bare])
        report[f"{key}_ratio"] = round(ratio, 4)
        report[f"{key}_interval"] = [round(interval.low, 4), round(interval.high, 4)]
    return report


def _processor() -> str:
    """Return the name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


async def _load(loaded: Server, concurrent: int, new_tokens: int) -> Round:
    from openai import AsyncOpenAI

    prompts = [f"{place}. {PROMPTS[place % len(PROMPTS)]}" for place in range(concurrent)]
    async with AsyncOpenAI(base_url=loaded.address, api_key="none", max_retries=0) as client:
        computed, begin = loaded.seconds(), time.perf_counter()
        streams = await asyncio.gather(*(_stream(client, prompt, new_tokens) for prompt in prompts))
        seconds = time.perf_counter() - begin
    first = statistics.median(times[1] - times[0] for times in streams)
    between = statistics.median(later - sooner for times in streams for sooner, later in pairwise(times[1:]))
    worker_s, front_s = (now - before for now, before in zip(loaded.seconds(), computed, strict=True))
    return Round(concurrent * new_tokens / seconds, 1000 * first, 1000 * between, worker_s, front_s)


async def _stream(client: Any, prompt: str, new_tokens: int) -> list[float]:
    """Return when the request was sent and when each of its tokens came, in seconds."""
    sent = time.perf_counter()
    stream = await ask(client, prompt, new_tokens, ignore_eos=True)
    said = [time.perf_counter() async for chunk in stream if any(choice.delta.content for choice in chunk.choices)]
    return [sent, *said]


if __name__ == "__main__":
    typer.run(main)
