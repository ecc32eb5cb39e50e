"""What a guard costs a vLLM server: a bare and a guarded one side by side, loaded in turn.

    python bench/serving.py --guard random

Both servers run all the time; each round sends the same requests to one and then to the other, in changing order, so
that what else the machine does falls on both. Run it in the environment of vLLM. The last line is JSON.
"""

import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from _server import CONSOLE, ask, server

from spider_sense.bench import random_guard
from spider_sense.models import load_model
from spider_sense.types import Site

PROMPTS = (
    "Describe a quiet morning by the sea for somebody who has never been there.",
    "What should I think of when I plan a small vegetable garden on a balcony?",
    "Explain how a bicycle stays upright, in words that a child understands.",
    "Write a letter to a neighbour about a party on Saturday.",
)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of requests took."""

    tokens_per_s: float
    first_ms: float
    """Median time to the first token."""
    between_ms: float
    """Median time between tokens."""


def main(
    model: Annotated[str, typer.Option(help="Local folder of a model; smollm2 is the packaged one.")] = "smollm2",
    guard: Annotated[str, typer.Option(help="Folder of a guard, or random: 64 heads at 8 sites.")] = "random",
    concurrent: Annotated[int, typer.Option(help="Requests of a round, all at once.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of each server.")] = 9,
    eager: Annotated[bool, typer.Option(help="Serve without torch.compile.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
) -> None:
    """Measure throughput, time to the first token and time between tokens, guarded over bare."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loaded = load_model(model, dtype)
        folder, guard_folder = loaded.model.name_or_path, Path(guard)
        if guard == "random":
            layers = loaded.model.config.num_hidden_layers
            sites = tuple(Site(place * layers // 8, "resid") for place in range(8))
            guard_folder = work / "guard"
            random_guard(loaded, 64, sites).save_pretrained(guard_folder)
        del loaded
        options = ["--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", str(concurrent)]
        options += ["--enforce-eager"] if eager else []
        addresses = {
            "bare": stack.enter_context(server(folder, options, work / "bare")),
            "guarded": stack.enter_context(server(folder, options, work / "guarded", guard_folder)),
        }
        found: dict[str, list[Round]] = {name: [] for name in addresses}
        for index in range(-1, rounds):
            for name in list(addresses)[:: 1 if index % 2 else -1]:
                result = asyncio.run(_load(addresses[name], concurrent, new_tokens))
                CONSOLE.print(f"round {index + 1} of {rounds}, {name}: {result.tokens_per_s:.0f} tokens/s")
                if index >= 0:  # the first round warms up
                    found[name].append(result)
    typer.echo(json.dumps(_report(found, model, concurrent, new_tokens, eager, dtype)))


def _report(found: dict[str, list[Round]], *about: Any) -> dict[str, Any]:
    names = ("model", "concurrent", "new_tokens", "eager", "dtype")
    report: dict[str, Any] = dict(zip(names, about, strict=True)) | {"rounds": len(found["bare"])}
    for key, figure in {"throughput": "tokens_per_s", "ttft": "first_ms", "itl": "between_ms"}.items():
        pairs = [(getattr(one, figure), getattr(other, figure)) for one, other in zip(*found.values(), strict=True)]
        report[figure] = {
            name: round(statistics.median(column), 2)
            for name, column in zip(found, zip(*pairs, strict=True), strict=True)
        }
        report[f"{key}_ratio"] = round(statistics.median(guarded / bare for bare, guarded in pairs), 4)
    return report | {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


async def _load(address: str, concurrent: int, new_tokens: int) -> Round:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
        begin = time.perf_counter()
        streams = await asyncio.gather(
            *(_stream(client, f"{place}. {PROMPTS[place % len(PROMPTS)]}", new_tokens) for place in range(concurrent))
        )
        seconds = time.perf_counter() - begin
    first = statistics.median(times[1] - times[0] for times in streams)
    between = statistics.median(later - sooner for times in streams for sooner, later in pairwise(times[1:]))
    return Round(concurrent * new_tokens / seconds, 1000 * first, 1000 * between)


async def _stream(client: Any, prompt: str, new_tokens: int) -> list[float]:
    """Return when the request was sent and when each of its tokens came, in seconds."""
    sent = time.perf_counter()
    stream = await ask(client, prompt, new_tokens, ignore_eos=True)
    said = [time.perf_counter() async for chunk in stream if any(choice.delta.content for choice in chunk.choices)]
    return [sent, *said]


if __name__ == "__main__":
    typer.run(main)
