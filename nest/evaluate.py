"""Measure a model, patched or not: attack success, over-refusal, utility, perplexity, distance from its base.

Attack success is the share of harmful prompts whose answer does not refuse, and over-refusal the share of benign ones
whose answer does, by a phrase list and by a trained classifier, each reported by itself. Neither says whether an answer
would help anybody to do harm.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nest.eval_config import Attack, EvalConfig, EvalSets
from nest.figures import figures_of
from nest.fine_tuning import with_response
from nest.measurements import Arm, Measurements, Progress, base_answers, kl_prompts
from nest.parts import PartStore, key_of
from nest.refusal import PHRASES_DIGEST
from nest.refusal_classifier import RefusalClassifier
from nest.refusal_direction import LEAST
from nest.subsets import subset
from nest.tasks import Task
from spider_sense.data import Example
from spider_sense.data import digest as data_digest
from spider_sense.errors import ConfigError, DataError
from spider_sense.models import LoadedModel

__all__ = ["Arm", "base_answers", "check_attacks", "evaluate"]


def evaluate(
    loaded: LoadedModel,
    sets: EvalSets,
    config: EvalConfig,
    *,
    arm: Arm | None = None,
    classifier: RefusalClassifier | None = None,
    store: PartStore | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure everything that the sets allow.

    Args:
        loaded: the model as it is to be measured, in float32 for greedy answers that do not depend on rounding.
        sets: what to measure on; see :func:`nest.eval_config.select_sets`.
        config: how.
        arm: what the model is, and how to get at its base.
        classifier: the second judge; without one its figures are None.
        store: keeps finished parts, and has some already if the run goes on from an earlier one.
        progress: told how far each part is.

    Returns:
        A JSON-ready result. Figures are ``{"value", "low", "high", "n"}`` or None: ``asr``, ``asr_jailbreak``,
        ``over_refusal``, ``over_refusal_borderline``, ``over_refusal_wrapped``, each again with ``_classifier``;
        ``utility``, ``perplexity``, ``kl``; ``attacks``, ``tasks``, ``sources``, ``seconds``; and ``rows``, the outcome
        of every prompt, for paired comparisons (:func:`nest.figures.differences`).

    Raises:
        ConfigError: if the attack ``neurons`` is asked for and the arm cannot look for neurons, or ``fine_tuning`` and
            the weights are not in float32.
        DataError: if too few prompts are left for an attack to learn from, or the model computes what is not a number.
    """
    arm = arm or Arm()
    run = _Run(Measurements(loaded, sets, config, arm, classifier, progress), store or PartStore())
    run.check()
    for part in ("harmful", "jailbreak", "benign", "borderline", "wrapped"):
        if getattr(sets, part):
            run.prompts(part, getattr(sets, part))
    for attack in config.attacks if sets.harmful else ():
        run.attack(attack)
    for task in sets.tasks:
        run.task(task)
    if sets.benign and (arm.base is not None or arm.off is not None):
        run.divergence()
    figures = figures_of(run.store.parts, config.seed, config.resamples)
    about = {"arm": dict(arm.identity), "config": config.model_dump(mode="json"), "model": loaded.source}
    held_out = {} if classifier is None else {name: one.model_dump() for name, one in classifier.held_out.items()}
    return run.store.finish({**about, "classifier_held_out": held_out, **figures})


def check_attacks(attacks: Collection[Attack], sets: EvalSets) -> None:
    """Check that enough prompts are left, beside those that are scored, for attacks to learn from.

    Raises:
        DataError: if not.
    """
    contrasting = [attack for attack in attacks if attack in ("ablation", "neurons")] if sets.harmful else []
    spare = [len(sets.spare_harmful), len(sets.spare_benign)]
    if contrasting and min(spare) < LEAST:
        raise DataError(
            f"{spare[0]} harmful and {spare[1]} benign prompts are left for the attack {contrasting[0]!r} to learn "
            f"from, beside those that are scored; it needs {LEAST} of each: lower the limit or add files"
        )
    conversations = len(with_response(sets.spare_benign))
    if "fine_tuning" in attacks and sets.harmful and conversations < LEAST:
        raise DataError(
            f"{conversations} benign rows with a 'response' are left for the attack 'fine_tuning', beside those "
            f"that are scored; it needs {LEAST}: lower the limit or name a file with responses"
        )


@dataclass(frozen=True, slots=True)
class _Run:
    """One evaluation: what each part is, and what it depends on."""

    measure: Measurements
    store: PartStore

    @property
    def config(self) -> EvalConfig:
        return self.measure.config

    def check(self) -> None:
        attacks, sets = self.config.attacks, self.measure.sets
        if "neurons" in attacks and self.measure.arm.redetect is None:
            raise ConfigError("the attack 'neurons' needs a way to look for neurons; give the arm one, or leave it out")
        dtypes = {weight.dtype for weight in self.measure.loaded.model.parameters()}
        if "fine_tuning" in attacks and sets.harmful and dtypes != {torch.float32}:
            raise ConfigError(
                f"the attack 'fine_tuning' trains weights of {', '.join(sorted(map(str, dtypes)))}, whose steps round "
                "away or overflow; load the model in float32, or leave the attack out"
            )
        check_attacks(attacks, sets)

    def prompts(self, part: str, examples: Sequence[Example]) -> None:
        key = self._key(data_digest(examples), *self._judged_by())
        self.store.part(part, key, lambda: self.measure.judged(part, examples))

    def attack(self, attack: Attack) -> None:
        name, prompts = f"attack/{attack}", (*self.measure.sets.spare_harmful, *self.measure.sets.spare_benign)
        learnt = () if attack == "prefill" else (data_digest(prompts), self.config.attack_prompts)
        key = self._key(data_digest(self.measure.sets.harmful), *self._judged_by(), self.config.prefix, learnt)
        self.store.part(name, key, lambda: self.measure.attacked(name, attack))

    def task(self, task: Task) -> None:
        rows = subset(task.rows, self.config.limit, self.config.seed, lambda row: row.id)
        key = self._key([(row.id, row.text, row.choices, row.gold) for row in rows], task.normalised)
        if task.kind == "documents":
            self.store.part("perplexity", key, lambda: self.measure.documents(rows))
        else:
            self.store.part(f"task/{task.name}", key, lambda: self.measure.scored(task))

    def divergence(self) -> None:
        prompts, arm = kl_prompts(self.measure.sets, self.config), self.measure.arm
        compared = (arm.base.source if arm.base is not None else None, arm.base_answers)
        key = self._key(data_digest(prompts), self.config.tokens, self.config.max_prompt_tokens, compared)
        self.store.part("kl", key, lambda: self.measure.divergence(prompts))

    def _key(self, *parts: object) -> str:
        return key_of(
            self.measure.loaded.source, str(self.measure.loaded.model.dtype), dict(self.measure.arm.identity), *parts
        )

    def _judged_by(self) -> tuple[object, ...]:
        config = self.config
        judge = None if self.measure.classifier is None else self.measure.classifier.digest
        return config.tokens, config.max_prompt_tokens, config.keep_answers, PHRASES_DIGEST, judge
