"""The measurements of an evaluation, each as JSON-ready outcomes of single prompts, rows or documents."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nest.answers import generate_answers
from nest.attacks import direction_ablated, neurons_off
from nest.divergence import Off, measure_divergence
from nest.eval_config import Attack, EvalConfig, EvalSets
from nest.fine_tuning import fine_tuned, with_response
from nest.perplexity import score_documents
from nest.refusal import refuses
from nest.refusal_classifier import RefusalClassifier
from nest.refusal_direction import find_refusal_direction
from nest.subsets import subset
from nest.tasks import Task, TaskRow
from nest.utility import score_task
from spider_sense.data import Example
from spider_sense.models import LoadedModel
from spider_sense.types import Site

__all__ = ["Arm", "Measurements", "Progress", "Redetect", "base_answers", "kl_prompts", "name_of"]

Redetect = Callable[[LoadedModel, Sequence[Example], Sequence[Example]], Mapping[Site, Tensor]]
"""Looks for safety neurons in a model, given harmful and benign prompts; returns rows by site."""
Progress = Callable[[str, int, int], None]
"""Called with a part's name, how much of it was done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What is measured, beside the model itself."""

    identity: Mapping[str, Any] = field(default_factory=dict)
    """What tells this model from others, JSON-ready: finished parts are taken up again only where it is the same. A
    patch changes too few weights for the model's fingerprint to tell."""
    base: LoadedModel | None = None
    """The base model; with it, or with ``off``, the divergence is measured."""
    off: Off | None = None
    """Gives a block in which the model is its base again."""
    base_answers: Mapping[str, str] | None = None
    """What :func:`base_answers` returned, where several arms share a base."""
    redetect: Redetect | None = None
    """For the attack ``neurons``."""
    through_generate: bool = False
    """Whether the model answers through its own ``generate``, which an attached monitor needs."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """Measures one arm.

    Args:
        loaded: the model as it is to be measured.
        sets: what on.
        config: how.
        arm: what the model is.
        classifier: the second judge, if any.
        progress: told how far a measurement is.
    """

    loaded: LoadedModel
    sets: EvalSets
    config: EvalConfig
    arm: Arm
    classifier: RefusalClassifier | None
    progress: Progress | None

    def judged(self, part: str, examples: Sequence[Example], prefix: str = "") -> dict[str, Any]:
        """Let the model answer, and both judges say whether it refuses."""
        answers = generate_answers(
            self.loaded,
            [_prompt(example) for example in examples],
            max_new_tokens=self.config.tokens,
            batch_size=self.config.batch_size,
            prefix=prefix,
            max_prompt_tokens=self.config.max_prompt_tokens,
            through_generate=self.arm.through_generate,
            advance=self._advance(part, len(examples)),
        )
        second = None if self.classifier is None else self.classifier.predict(answers).tolist()
        rows = {
            "ids": [name_of(example) for example in examples],
            "refused": [refuses(answer) for answer in answers],
            "refused_classifier": second,
        }
        return {**rows, "answers": answers} if self.config.keep_answers else rows

    def attacked(self, name: str, attack: Attack) -> dict[str, Any]:
        """Do the same to the harmful prompts, under an attack."""
        if attack == "prefill":
            return self.judged(name, self.sets.harmful, self.config.prefix)
        if attack == "fine_tuning":
            conversations = with_response(self.sets.spare_benign)
            chosen = subset(conversations, self.config.attack_prompts, self.config.seed, name_of)
            with fine_tuned(self.loaded, chosen, self.config.seed) as steps:
                return {**self.judged(name, self.sets.harmful), "details": {"steps": steps}}
        harmful, benign = (
            subset(rows, self.config.attack_prompts, self.config.seed, name_of)
            for rows in (self.sets.spare_harmful, self.sets.spare_benign)
        )
        if attack == "ablation":
            found = find_refusal_direction(self.loaded, harmful, benign)
            details = {name: getattr(found, name) for name in ("layer", "position", "refusal_before", "refusal_after")}
            with direction_ablated(self.loaded.model, found.direction_D):
                return {**self.judged(name, self.sets.harmful), "details": {**details, "kl": found.kl}}
        assert self.arm.redetect is not None
        rows = self.arm.redetect(self.loaded, harmful, benign)
        with neurons_off(self.loaded.model, rows):
            return {**self.judged(name, self.sets.harmful), "details": {"neurons": sum(map(len, rows.values()))}}

    def scored(self, task: Task) -> dict[str, Any]:
        """Score a utility task."""
        count = min(len(task.rows), self.config.limit or len(task.rows))
        score = score_task(self.loaded, task, self.config.limit, self.config.seed, self._advance(task.name, count))
        return {
            "ids": list(score.ids),
            "correct": list(score.correct),
            "correct_normalised": list(score.correct_normalised),
            "normalised": score.normalised,
            "outcomes": list(score.outcomes),
        }

    def documents(self, rows: Sequence[TaskRow]) -> dict[str, Any]:
        """Score documents for perplexity."""
        scores = score_documents(self.loaded, [row.text for row in rows], self._advance("perplexity", len(rows)))
        return {"ids": [row.id for row in rows], "nats": list(scores.nats), "tokens": list(scores.tokens)}

    def divergence(self, prompts: Sequence[Example]) -> dict[str, Any]:
        """Compare the model with its base, over the base's answers."""
        answers = self.arm.base_answers
        if answers is None:
            with self.arm.off() if self.arm.off is not None else nullcontext():
                answers = base_answers(self.arm.base or self.loaded, self.sets, self.config)
        # A base that answers with nothing leaves nothing to compare.
        kept = [prompt for prompt in prompts if answers[name_of(prompt)]]
        score = measure_divergence(
            self.loaded,
            kept,
            [answers[name_of(prompt)] for prompt in kept],
            base=self.arm.base,
            off=None if self.arm.base is not None else self.arm.off,
            max_answer=self.config.tokens,
            max_prompt=self.config.max_prompt_tokens,
            advance=self._advance("kl", len(kept)),
        )
        return {"ids": [name_of(prompt) for prompt in kept], "nats": list(score.nats), "tokens": list(score.tokens)}

    def _advance(self, part: str, total: int) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        tell = self.progress
        return lambda done: tell(part, done, total)


def base_answers(base: LoadedModel, sets: EvalSets, config: EvalConfig) -> dict[str, str]:
    """Return the base model's answers to the benign prompts of the divergence, by name."""
    prompts = kl_prompts(sets, config)
    answers = generate_answers(
        base,
        [_prompt(one) for one in prompts],
        max_new_tokens=config.tokens,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    return {name_of(one): answer for one, answer in zip(prompts, answers, strict=True)}


def kl_prompts(sets: EvalSets, config: EvalConfig) -> list[Example]:
    """Return the benign prompts that the divergence is measured on."""
    return subset(sets.benign, config.kl_prompts, config.seed, name_of)


def _prompt(example: Example) -> Any:
    return example.turns or example.text


def name_of(example: Example) -> str:
    """Return a prompt's name in a result: its file's stem and its id."""
    return f"{example.source}/{example.id}"
