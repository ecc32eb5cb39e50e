"""One arm, trained: its learning rate chosen as every other arm's, its run resumable."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from nest.arms import build
from nest.bench.config import BenchConfig
from nest.bench.stage import Stage
from nest.forward import answer_logits
from nest.full import Change
from nest.lessons import collate
from nest.parts import key_of
from nest.tune import Losses, tune
from spider_sense.errors import DataError

__all__ = ["Advance", "choose_rate", "held_out_loss", "trained"]

_DIVERGED = 1e9
Advance = Callable[[str, Losses], None]
"""Called with the run's name after each step."""


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
    arm: str, seed: int, draw: int, stage: Stage, config: BenchConfig, rate: float, advance: Advance
) -> tuple[Change, float]:
    """Tune an arm, or take up where an earlier run stopped.

    Args:
        arm: a key of ``ARMS``.
        seed: of the order of lessons.
        draw: of the arm's own draw.
        stage: what all arms share.
        config: the comparison.
        rate: learning rate.
        advance: see ``Advance``.

    Returns:
        The change, and the seconds that its steps took, over all runs.
    """
    settings = {"learning_rate": rate, "seed": seed}
    key = key_of(stage.digest, config.tune.model_copy(update=settings).model_dump())
    name = f"{arm}-seed{seed}-draw{draw}"
    folder = config.output / "checkpoints" / f"{name}-{key[:8]}"
    clock = _Clock(folder.with_suffix(".json"))
    change = build(arm, stage.loaded.model, stage.neurons, draw)

    def step(losses: Losses) -> None:
        clock.tick(losses.step)
        advance(name, losses)

    _tune(change, stage, config, settings, folder, step)
    return change, clock.seconds


@torch.no_grad()
def held_out_loss(change: Change, stage: Stage, config: BenchConfig) -> float:
    """Return refusals' and answers' mean loss over the held-out lessons, in nats per token, weighted as in training."""
    sums = {"refuse": [0.0, 0], "answer": [0.0, 0]}
    size = config.tune.batch_size
    with change.folded():
        for start in range(0, len(stage.held_out), size):
            chosen = range(len(stage.held_out))[start : start + size]
            batch = collate(stage.held_out, chosen, stage.pad, stage.loaded.model.device)
            log_BAV = answer_logits(stage.loaded.model, batch).float().log_softmax(-1)
            picked_BA = -log_BAV.gather(-1, batch.target_BA.clamp(min=0)[..., None])[..., 0]
            for place, row in enumerate(chosen):
                real_A = batch.target_BA[place] >= 0
                entry = sums[stage.held_out[row].kind]
                entry[0] += float(picked_BA[place][real_A].sum())
                entry[1] += int(real_A.sum())
    weights = {"refuse": 1.0, "answer": config.tune.answer_weight + config.tune.kl_weight}
    return sum(weights[kind] * total / max(1, tokens) for kind, (total, tokens) in sums.items())


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
