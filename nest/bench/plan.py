"""Which training runs a comparison consists of."""

from collections.abc import Iterator
from dataclasses import dataclass

from nest.bench.config import BenchConfig

__all__ = ["Run", "plan"]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of an arm."""

    arm: str
    seed: int
    """Of the order of lessons."""
    draw: int
    """Of the arm's own draw."""

    @property
    def name(self) -> str:
        """How its files are called."""
        return f"{self.arm}-seed{self.seed}-draw{self.draw}"


def plan(config: BenchConfig) -> Iterator[Run]:
    """Yield all runs, one of every arm before any arm's next: what is cut off early still compares all arms."""
    for index, seed in enumerate(config.seeds):
        for arm in config.arms:
            yield Run(arm, seed, seed)
        if index == 0 and "random_rows" in config.arms:
            yield from (Run("random_rows", seed, seed + 1000 + draw) for draw in range(1, config.draws))
