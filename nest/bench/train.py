"""One arm, trained: its learning rate chosen as every other arm's, its run resumable."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors.torch import save_file

from nest.arms import build
from nest.bench.config import BenchConfig
from nest.bench.plan import Run
from nest.bench.stage import Stage
from nest.full import Change
from nest.lessons import by_length, collate
from nest.objective import Objective, token_counts
from nest.parts import key_of
from nest.tune import Losses, tune
from spider_sense.errors import DataError

__all__ = ["Advance", "Trained", "choose_rate", "held_out_loss", "trained"]

_DIVERGED = 1e9
Advance = Callable[[str, Losses], None]
"""Called with the run's name after each step."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A run that is done."""

    change: Change
    seconds: float
    """That its steps took, over all calls."""
    snapshots: dict[int, Path]
    """Files with the trained numbers as they were after some steps."""


def choose_rate(arm: str, stage: Stage, config: BenchConfig, advance: Advance) -> float:
    """Return the learning rate with the least loss on held-out lessons after a short trial, the same for every arm."""
    file = config.output / "rates" / f"{arm}.json"
    seed, losses, rates = config.seeds[0], _read(file), config.rates_of(arm)
    keys = {rate: key_of(stage.digest, config.tune.model_dump(), config.probe_steps, seed, rate) for rate in rates}
    for rate in rates if len(rates) > 1 else ():
        if keys[rate] not in losses:
            losses[keys[rate]] = _trial(arm, rate, stage, config, partial(advance, f"{arm}, trial at {rate:g}"))
            _write(file, losses)
    return min(rates, key=lambda rate: losses.get(keys[rate], 0.0))


def _trial(arm: str, rate: float, stage: Stage, config: BenchConfig, advance: Callable[[Losses], None]) -> float:
    """Return the held-out loss after a few steps, a number too large to be chosen where they diverged."""
    change = build(arm, stage.loaded.model, stage.neurons, config.seeds[0])
    try:
        settings = {"steps": config.probe_steps, "learning_rate": rate, "seed": config.seeds[0]}
        _tune(change, stage, config, settings, None, advance)
    except DataError:
        return _DIVERGED
    loss = held_out_loss(change, stage, config)
    return loss if math.isfinite(loss) else _DIVERGED


def trained(
    run: Run,
    stage: Stage,
    config: BenchConfig,
    rate: float,
    advance: Advance,
    milestones: Sequence[int] = (),
) -> Trained:
    """Tune an arm, or take up where an earlier call stopped.

    Args:
        run: the arm, its seed and its draw.
        stage: what all arms share.
        config: the comparison.
        rate: learning rate.
        advance: see ``Advance``.
        milestones: numbers of steps after which the trained numbers are kept.

    Raises:
        DataError: if the loss diverges, or an earlier call passed a milestone without keeping it.
    """
    settings = {"learning_rate": rate, "seed": run.seed}
    key = key_of(stage.digest, config.tune.model_copy(update=settings).model_dump())
    folder = config.output / "checkpoints" / f"{run.name}-{key[:8]}"
    clock = _Clock(folder.with_suffix(".json"))
    change = build(run.arm, stage.loaded.model, stage.neurons, run.draw)
    snapshots = {steps: config.output / "snapshots" / f"{folder.name}-step{steps}.safetensors" for steps in milestones}

    def step(losses: Losses) -> None:
        clock.tick(losses.step)
        if losses.step + 1 in snapshots:
            snapshots[losses.step + 1].parent.mkdir(parents=True, exist_ok=True)
            save_file(change.values(), snapshots[losses.step + 1])
        advance(run.name, losses)

    _tune(change, stage, config, settings, folder, step)
    lost = [steps for steps, file in snapshots.items() if not file.is_file()]
    if lost:
        raise DataError(
            f"{folder} was trained without keeping what it was after {lost[0]} steps; remove that folder to train it "
            "again, or leave the milestone out"
        )
    return Trained(change, clock.seconds, snapshots)


@torch.no_grad()
def held_out_loss(change: Change, stage: Stage, config: BenchConfig) -> float:
    """Return the loss over the held-out lessons, in nats per token; answers weigh what answers and divergence do."""
    lessons, everything = stage.held_out, range(len(stage.held_out))
    objective, sums_3 = Objective(stage.loaded.model, change, {}), torch.zeros(3)
    with change.folded():
        for part in by_length(lessons, everything, config.tune.batch_size):
            sums_3 += objective(collate(lessons, part, stage.pad, stage.loaded.model.device)).cpu()
    refuse, answer, _ = sums_3 / torch.tensor(token_counts(lessons, everything, {}))
    return float(refuse + (config.tune.answer_weight + config.tune.kl_weight) * answer)


def _tune(
    change: Change,
    stage: Stage,
    config: BenchConfig,
    settings: dict[str, Any],
    folder: Path | None,
    advance: Callable[[Losses], None],
) -> None:
    tuning = config.tune.model_copy(update=settings)
    tune(stage.loaded.model, change, stage.train, tuning, stage.pad, stage.references, folder, advance)


class _Clock:
    """Seconds of steps, kept in a file so that an interrupted run loses none."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, monotonic()
        self._seconds: dict[str, float] = _read(path)

    def tick(self, step: int) -> None:
        now = monotonic()
        self._seconds[str(step)] = round(now - self._last, 3)
        self._last = now
        _write(self._path, self._seconds)

    @property
    def seconds(self) -> float:
        return sum(self._seconds.values())


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(record), encoding="utf-8")
    beside.replace(path)
