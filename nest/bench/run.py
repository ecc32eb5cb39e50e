"""Run the comparison arm by arm; everything that is finished is kept, so it can be cut off and started again."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from rich.progress import Progress

from nest.bench.config import BenchConfig
from nest.bench.stage import Stage, set_stage
from nest.bench.train import Advance, choose_rate, trained
from nest.delta import Deltas, patch_targets
from nest.eval_config import ATTACKS, EvalConfig, EvalSets
from nest.evaluate import Arm, base_answers, evaluate
from nest.find import find
from nest.full import Change
from nest.parts import PartStore
from nest.subsets import subset
from nest.tune import Losses
from spider_sense.data import Example
from spider_sense.models import LoadedModel
from spider_sense.patch import KIND, NeuronPatch, PatchManifest

__all__ = ["Run", "plan", "run_bench"]

Results = dict[str, dict[str, Any]]
"""Results of single runs, by the run's name; ``base`` is the model as it came."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of an arm."""

    arm: str
    seed: int
    draw: int

    @property
    def name(self) -> str:
        """How its files are called."""
        return f"{self.arm}-seed{self.seed}-draw{self.draw}"


def plan(config: BenchConfig) -> Iterator[Run]:
    """Yield all runs, one seed of every arm before the next seed: what is cut off early still compares all arms."""
    for index, seed in enumerate(config.seeds):
        for arm in config.arms:
            yield Run(arm, seed, seed)
            if arm == "random_rows" and index == 0:
                yield from (Run(arm, seed, seed + 1000 + draw) for draw in range(1, config.draws))


def run_bench(config: BenchConfig, progress: Progress) -> tuple[Results, dict[str, Results]]:
    """Train and measure every arm.

    Returns:
        The results by run, and by arm the points of its frontier by strength.
    """
    stage = set_stage(config, progress)
    bench = _Bench(config, stage, progress)
    nothing = {"trained_parameters": 0, "trained_share": 0.0, "patch_bytes": 0, "train_seconds": 0.0}
    results: Results = {"base": {**bench.measure("base", None), **nothing}}
    frontiers: dict[str, Results] = {}
    for run in plan(config):
        change, seconds, rate = bench.train(run)
        result = bench.measure(run.name, change, rate)
        about = {"trained_parameters": change.count(), "trained_share": change.count() / bench.parameters}
        results[run.name] = {**result, **about, "train_seconds": round(seconds, 1), "learning_rate": rate}
        results[run.name]["patch_bytes"] = bench.patch_bytes(run, change)
        if run.seed == config.seeds[0] and run.draw == run.seed:
            frontiers[run.arm] = {f"{alpha:g}": bench.point(run, change, alpha, rate) for alpha in config.alphas}
    return results, frontiers


class _Bench:
    """What the runs share while they are measured."""

    def __init__(self, config: BenchConfig, stage: Stage, progress: Progress) -> None:
        self._config, self._stage, self._progress = config, stage, progress
        self._bar = progress.add_task("base", total=None)
        self.parameters = sum(weight.numel() for weight in stage.loaded.model.parameters())
        self._answers = base_answers(stage.loaded, stage.sets, config.evaluate)
        # The divergence runs base and tuned model side by side.
        self._base = replace(stage.loaded, model=deepcopy(stage.loaded.model))

    def train(self, run: Run) -> tuple[Change, float, float]:
        rate = choose_rate(run.arm, self._stage, self._config, self._steps())
        change, seconds = trained(run.arm, run.seed, run.draw, self._stage, self._config, rate, self._steps())
        return change, seconds, rate

    def measure(self, name: str, change: Change | None, rate: float | None = None) -> dict[str, Any]:
        config = self._config.evaluate
        if self._config.stress and (change is None or name.partition("-")[0] in self._config.stress):
            config = config.model_copy(update={"attacks": ATTACKS})
        base = None if change is None else self._base
        return self._evaluated(f"results/{name}", name, change, self._stage.sets, config, base, rate)

    def point(self, run: Run, change: Change, alpha: float, rate: float) -> dict[str, Any]:
        """Measure attack success against over-refusal at one strength, on fewer prompts."""
        limit, seed = self._config.frontier_limit, self._config.evaluate.seed
        sets = self._stage.sets
        few = replace(
            sets,
            harmful=_few(sets.harmful, limit, seed),
            benign=_few(sets.benign, limit, seed),
            borderline=_few(sets.borderline, limit, seed),
            jailbreak=(),
            wrapped=(),
            tasks=(),
        )
        change.alpha = alpha
        name = f"{run.name}-alpha{alpha:g}"
        config = self._config.evaluate.model_copy(update={"attacks": ()})
        try:
            return self._evaluated(f"frontier/{name}", name, change, few, config, None, rate)
        finally:
            change.alpha = 1.0

    def patch_bytes(self, run: Run, change: Change) -> int:
        """Return the size of what has to be shipped: the patch's folder, or the trained numbers in float32."""
        if run.arm != "nest" or not isinstance(change, Deltas):
            return 4 * change.count()
        neurons = self._stage.neurons
        manifest = PatchManifest(
            schema_version=KIND.version,
            base=self._stage.base,
            sites=tuple(map(str, neurons.sites)),
            trained_parameters=change.count(),
            trained_share=change.count() / self.parameters,
            recipe={"find": neurons.manifest.recipe, "tune": self._config.tune.model_dump()},
        )
        folder = self._config.output / "patches" / run.name
        NeuronPatch(manifest, patch_targets(change, neurons)).save_pretrained(folder)
        return sum(file.stat().st_size for file in folder.iterdir())

    def _evaluated(
        self,
        file: str,
        name: str,
        change: Change | None,
        sets: EvalSets,
        config: EvalConfig,
        base: LoadedModel | None,
        rate: float | None,
    ) -> dict[str, Any]:
        self._progress.update(self._bar, description=f"measuring {name}", total=None)
        stage = self._stage
        identity = {
            "run": name,
            "tune": self._config.tune.model_dump(),
            "rate": rate,
            "stage": stage.digest,
        }
        arm = Arm(identity=identity, base=base, base_answers=self._answers, redetect=_redetect)
        with nullcontext() if change is None else change.folded():
            return evaluate(
                stage.loaded,
                sets,
                config,
                arm=arm,
                classifier=stage.classifier,
                store=PartStore(self._config.output / f"{file}.json"),
                progress=self._parts(name),
            )

    def _steps(self) -> Advance:
        def tell(name: str, losses: Losses) -> None:
            text = f"{name}: refuse {losses.refuse:.2f}, answer {losses.answer:.2f}, KL {losses.kl:.3f}"
            self._progress.update(self._bar, description=text, completed=losses.step + 1, total=self._config.tune.steps)

        return tell

    def _parts(self, name: str) -> Any:
        done: dict[str, int] = {}

        def tell(part: str, more: int, total: int) -> None:
            done[part] = done.get(part, 0) + more
            self._progress.update(self._bar, description=f"{name}: {part}", completed=done[part], total=total)

        return tell


def _few(examples: tuple[Example, ...], limit: int, seed: int) -> tuple[Example, ...]:
    sources = dict.fromkeys(example.source for example in examples)
    return tuple(
        one
        for source in sources
        for one in subset([row for row in examples if row.source == source], limit, seed, lambda row: row.id)
    )


def _redetect(loaded: LoadedModel, harmful: Any, benign: Any) -> Mapping[Any, Any]:
    from nest.find import FindConfig

    return {site: found.neuron_R for site, found in find(loaded, harmful, benign, FindConfig()).sites.items()}
