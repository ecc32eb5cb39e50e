"""What a live patch adds to a decoding step, alternated step by step.

    python bench/live_patch.py

Beside a machine's noise over seconds the patch is small, so the ways are run in turn on every token: bare, with a patch
that is on for nobody, with one that is on for a quarter of the requests, which stand side by side in the batch or as
far apart as can be, and bare once more, which shows the noise that is left. Patch and prompts are random, since only
their size matters. Nothing else of a guard is attached; `spider-sense bench` measures it whole.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import torch
import typer

from spider_sense.attach import Attachment
from spider_sense.bench import random_patch
from spider_sense.cli.app import run
from spider_sense.cli.progress import progress_bars
from spider_sense.intervals import ratio_of_rounds
from spider_sense.live_patch import LivePatch
from spider_sense.models import LoadedModel, load_model

PROMPT = 40
"""Tokens of each prompt."""
ANSWER = 32
"""Steps after which the prompts are read again, so that the context stays short."""
Way = Callable[[], AbstractContextManager[object]]


def main(
    model: Annotated[str, typer.Option(help="Name or folder of the model.")] = "smollm2",
    batch: Annotated[int, typer.Option(min=1, help="Requests in a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that every way computes.")] = 320,
) -> None:
    """Time the steps; print one line of JSON."""
    loaded = load_model(model, dtype="float32")
    with progress_bars() as progress:
        task = progress.add_task("steps of five ways", total=steps)
        line = measure(loaded, batch, steps, lambda: progress.advance(task))
    typer.echo(json.dumps(line))


@torch.inference_mode()
def measure(
    loaded: LoadedModel, batch: int, steps: int, advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Return medians in milliseconds a step, and of the ratios bare / with the patch of each step the median and its
    95% bootstrap interval over steps."""
    patched = max(1, batch // 4)
    seconds = _alternate(loaded, _ways(loaded, batch, patched), batch, steps, advance)
    ratios: dict[str, Any] = {}
    for name, taken in seconds.items():
        if name != "bare":
            ratio, interval = ratio_of_rounds(seconds["bare"], taken)
            ratios[f"{name}_ratio"] = round(ratio, 4)
            ratios[f"{name}_interval"] = [round(interval.low, 4), round(interval.high, 4)]
    return {
        "model": loaded.source,
        "batch": batch,
        "patched": patched,
        "steps": steps,
        "ms": {name: round(1000 * statistics.median(taken), 2) for name, taken in seconds.items()},
        **ratios,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _ways(loaded: LoadedModel, batch: int, patched: int) -> dict[str, Way]:
    live = LivePatch(loaded, random_patch(loaded))

    def with_rows(row_P: np.ndarray) -> Way:
        return lambda: Attachment(
            loaded.model, {}, lambda forward: live.set(forward.total, row_P), live.rest, patchers=live.patchers()
        )

    return {
        "bare": nullcontext,
        "off": with_rows(np.arange(0)),
        "on": with_rows(np.arange(patched)),
        "on_apart": with_rows(np.linspace(batch - 1, 0, patched).astype(np.int64)[::-1]),
        "bare_again": nullcontext,
    }


def _alternate(
    loaded: LoadedModel, ways: Mapping[str, Way], batch: int, steps: int, advance: Callable[[], object]
) -> dict[str, list[float]]:
    """Return the seconds that each way took for each step, the ways in a random order in every one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    generator = np.random.default_rng(0)
    for step in _steps(loaded.model, batch, steps):
        for name in generator.permutation(list(ways)).tolist():
            with ways[name]():
                seconds[name].append(step())
        advance()
    return seconds


def _steps(model: Any, batch: int, steps: int) -> Iterator[Callable[[], float]]:
    """Yield for each step what computes it once more and returns the seconds that it took."""
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(vocabulary, (batch, PROMPT), generator=generator)

    def step() -> float:
        start = time.perf_counter()
        model(token_B1, past_key_values=cache)
        taken = time.perf_counter() - start
        cache.crop(-1)
        return taken

    for number in range(steps):
        if number % ANSWER == 0:
            cache = model(prompt_BT, use_cache=True).past_key_values
        token_B1 = torch.randint(vocabulary, (batch, 1), generator=generator)
        yield step
        model(token_B1, past_key_values=cache)


if __name__ == "__main__":
    cli = typer.Typer(pretty_exceptions_enable=False)
    cli.command()(main)
    run(cli)
