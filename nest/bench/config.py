"""What ``nest bench`` compares, as YAML."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, FiniteFloat, NonNegativeInt, field_validator, model_validator

from nest.arms import ARMS
from nest.eval_config import EvalConfig
from nest.find import FindConfig
from nest.group import GroupConfig
from nest.tune import LearningRate, TuneConfig
from spider_sense.config import Settings
from spider_sense.errors import nearest

__all__ = ["BenchConfig", "Files"]

Part = Literal["harmful", "jailbreak", "benign", "borderline", "utility"]


_RATES_OF: dict[str, tuple[float, ...]] = {
    "lora_matched": (3e-4, 1e-3, 3e-3),
    "lora_qv": (3e-4, 1e-3, 3e-3),
    "full": (1e-5, 3e-5, 1e-4),
}
"""What is usual for arms that train other things than shared vectors."""


class Files(Settings):
    """Prompt sets; ``corpus`` names the pairs of the package, ``$NAME`` in a path is taken from the environment."""

    harmful: tuple[str, ...] = Field(min_length=1)
    benign: tuple[str, ...] = Field(min_length=1)
    jailbreak: tuple[str, ...] = ()
    borderline: tuple[str, ...] = ()
    utility: tuple[str, ...] = ()


class BenchConfig(Settings):
    """A comparison. No file may stand in both ``tune_on`` and ``test_on``."""

    model: str = "smollm2"
    output: Path
    """Folder of everything that is kept: a run that is cut off goes on from it."""
    tune_on: Files
    test_on: Files
    harmful_limit: int = Field(default=600, gt=0)
    benign_limit: int = Field(default=600, gt=0)
    find: FindConfig = FindConfig()
    group: GroupConfig = GroupConfig()
    tune: TuneConfig = TuneConfig()
    learning_rates: tuple[LearningRate, ...] = Field(default=(1e-3, 3e-3, 1e-2), min_length=1)
    """Each arm takes the one with the least loss on lessons that are held out of the tuning files."""
    learning_rates_of: dict[str, tuple[LearningRate, ...]] = Field(default_factory=lambda: dict(_RATES_OF))
    """Arms that are tuned at other rates, those of LoRA and of full fine-tuning unless they are named; as many of them,
    or the comparison would not be fair."""
    probe_steps: int = Field(default=40, gt=0)
    """Steps of a trial of a learning rate."""
    held_out: int = Field(default=64, ge=2)
    """Lessons that no arm is tuned on."""
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    draws: int = Field(default=5, gt=0)
    """Draws of ``random_rows``, each with the first seed of the order of lessons."""
    alphas: tuple[FiniteFloat, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    """Strengths of the frontier."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.25, 0.5)
    """Shares of the steps at which the frontier over training has a point, beside its end."""
    evaluate: EvalConfig = EvalConfig()
    stress: tuple[str, ...] = ("nest",)
    """Arms that are attacked in every way of ``nest eval``, and the base beside them."""

    def milestone_steps(self) -> tuple[int, ...]:
        """Return the milestones as numbers of steps."""
        return tuple(sorted({max(1, round(share * self.tune.steps)) for share in self.milestones}))

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """Return the learning rates that an arm chooses from."""
        return self.learning_rates_of.get(arm, self.learning_rates)

    @field_validator("learning_rates_of")
    @classmethod
    def _beside_the_usual(cls, given: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        return {**_RATES_OF, **given}

    @field_validator("arms", "stress", "learning_rates_of")
    @classmethod
    def _known(cls, arms: Any) -> Any:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arm {unknown[0]!r}; {nearest(unknown[0], ARMS)}")
        return arms

    @field_validator("arms", "stress", "seeds", "alphas", "milestones")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands there {values.count(twice)} times; name each once")
        return values

    @model_validator(mode="after")
    def _as_many_rates(self) -> Self:
        for arm, rates in self.learning_rates_of.items():
            if arm in self.arms and len(rates) != len(self.learning_rates):
                raise ValueError(
                    f"learning_rates_of.{arm} has {len(rates)} rates, learning_rates {len(self.learning_rates)}; "
                    "give each arm as many"
                )
        return self

    @field_validator("test_on")
    @classmethod
    def _unseen(cls, test_on: Files, info: object) -> Files:
        tune_on: Files | None = getattr(info, "data", {}).get("tune_on")
        both = sorted(_names(test_on) & _names(tune_on)) if tune_on else []
        if both:
            raise ValueError(f"{', '.join(both)} stand in tune_on as well; test on files that nothing was tuned on")
        return test_on


def _names(files: Files) -> set[str]:
    return {os.path.realpath(os.path.expandvars(name)) for part in get_args(Part) for name in getattr(files, part)}
