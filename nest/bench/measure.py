"""Measuring the arms of a comparison: the same prompts, the same base, the same judges for each."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

from rich.progress import Progress

from nest.bench.config import BenchConfig
from nest.bench.stage import Stage
from nest.eval_config import ATTACKS, EvalConfig, EvalSets
from nest.evaluate import Arm, base_answers, evaluate
from nest.find import FindConfig, find
from nest.full import Change
from nest.parts import PartStore
from nest.tune import Losses
from spider_sense.models import LoadedModel

__all__ = ["Bench", "Results"]

Results = dict[str, dict[str, Any]]
"""Results by name; ``base`` is the model as it came."""


class Bench:
    """What the runs share while they are measured.

    Args:
        config: the comparison.
        stage: the model, lessons and test sets.
        progress: gets a bar.
    """

    def __init__(self, config: BenchConfig, stage: Stage, progress: Progress) -> None:
        self.config, self.stage, self._progress = config, stage, progress
        self._bar = progress.add_task("base", total=None)
        self.parameters = sum(weight.numel() for weight in stage.loaded.model.parameters())
        self._answers = base_answers(stage.loaded, stage.sets, config.evaluate)
        # The divergence runs base and tuned model side by side.
        self._base = replace(stage.loaded, model=deepcopy(stage.loaded.model))
        sets = stage.sets
        self._frontier = EvalSets(harmful=sets.harmful, benign=sets.benign, borderline=sets.borderline)

    def measure(self, name: str, change: Change | None, rate: float | None = None) -> dict[str, Any]:
        """Measure a run in full, ``None`` being the base model; arms under ``stress`` are attacked as well."""
        config = self.config.evaluate
        if self.config.stress and (change is None or name.partition("-")[0] in self.config.stress):
            config = config.model_copy(update={"attacks": ATTACKS})
        arm = Arm(
            identity=self._identity(name, rate),
            base=None if change is None else self._base,
            base_answers=self._answers,
            redetect=_redetect,
        )
        changed = nullcontext() if change is None else change.folded()
        return self._evaluated(f"results/{name}", name, changed, self.stage.sets, config, arm)

    def point(
        self,
        name: str,
        changed: AbstractContextManager[object],
        rate: float | None,
        through_generate: bool = False,
    ) -> dict[str, Any]:
        """Measure attack success on direct prompts and over-refusal, for a point of the frontier.

        Args:
            name: of the point.
            changed: a block in which the model is what is to be measured.
            rate: learning rate of the run.
            through_generate: see :func:`nest.answers.generate_answers`.
        """
        config = self.config.evaluate.model_copy(update={"attacks": ()})
        arm = Arm(identity=self._identity(name, rate), through_generate=through_generate)
        return self._evaluated(f"frontier/{name}", name, changed, self._frontier, config, arm)

    def steps(self, name: str, losses: Losses) -> None:
        """Show a step of training."""
        text = f"{name}: refuse {losses.refuse:.2f}, answer {losses.answer:.2f}, KL {losses.kl:.3f}"
        self._progress.update(self._bar, description=text, completed=losses.step + 1, total=self.config.tune.steps)

    def _identity(self, name: str, rate: float | None) -> dict[str, Any]:
        return {"run": name, "tune": self.config.tune.model_dump(), "rate": rate, "stage": self.stage.digest}

    def _evaluated(
        self,
        file: str,
        name: str,
        changed: AbstractContextManager[object],
        sets: EvalSets,
        config: EvalConfig,
        arm: Arm,
    ) -> dict[str, Any]:
        self._progress.update(self._bar, description=f"measuring {name}", total=None)
        store = PartStore(self.config.output / f"{file}.json")
        with changed:
            return evaluate(
                self.stage.loaded,
                sets,
                config,
                arm=arm,
                classifier=self.stage.classifier,
                store=store,
                progress=self._parts(name),
            )

    def _parts(self, name: str) -> Any:
        done: dict[str, int] = {}

        def tell(part: str, more: int, total: int) -> None:
            done[part] = done.get(part, 0) + more
            self._progress.update(self._bar, description=f"{name}: {part}", completed=done[part], total=total)

        return tell


def _redetect(loaded: LoadedModel, harmful: Any, benign: Any) -> Mapping[Any, Any]:
    return {site: found.neuron_R for site, found in find(loaded, harmful, benign, FindConfig()).sites.items()}
