"""What all arms share, made once: the model, its neurons, the lessons and the test sets."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress

from nest.arms import check
from nest.bench.config import BenchConfig, Files
from nest.eval_config import ATTACKS, EvalSets, select_sets
from nest.evaluate import check_attacks
from nest.find import find
from nest.group import group
from nest.labelled_answers import labelled_answers, sample_answers
from nest.lessons import Lesson
from nest.neurons import KIND, NeuronSet
from nest.parts import key_of
from nest.prompts import CORPUS, load_prompts
from nest.reference import Reference
from nest.refusal_classifier import RefusalClassifier
from nest.run import read_lessons
from nest.tasks import read_tasks, utility_files
from spider_sense.data import Example, digest, read_jsonl
from spider_sense.errors import ConfigError
from spider_sense.fingerprint import Fingerprint, fingerprint
from spider_sense.folders import check_writable
from spider_sense.models import LoadedModel, load_model

__all__ = ["Stage", "expanded", "set_stage"]


_SHORT = 20
"""Characters: a shorter tuned prompt found inside a test prompt says nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Made once, used by every arm."""

    loaded: LoadedModel
    base: Fingerprint
    neurons: NeuronSet
    """Found and grouped."""
    harmful: tuple[Example, ...]
    benign: tuple[Example, ...]
    train: list[Lesson]
    held_out: list[Lesson]
    """Lessons that learning rates are chosen by."""
    references: dict[int, Reference]
    """By place in ``train``."""
    sets: EvalSets
    classifier: RefusalClassifier
    digest: str
    """Of everything above that a tuned arm depends on: model, neurons, lessons."""

    @property
    def pad(self) -> int:
        """Token id of padding."""
        return int(self.loaded.tokenizer.pad_token_id)


def set_stage(config: BenchConfig, progress: Progress, device: str = "cpu") -> Stage:
    """Load the model, find and group neurons, ask the base model for its answers, read the test sets.

    Raises:
        ConfigError: if an arm cannot train anything in this model, among others.
        DataError: if too few prompts are left for the attacks, among others; ``stress: []`` leaves them out.
    """
    check_writable(config.output)
    tune_on, test_on = expanded(config.tune_on), expanded(config.test_on)
    harmful = load_prompts(tune_on.harmful, "harmful", config.harmful_limit, config.tune.seed).examples
    benign = load_prompts(tune_on.benign, "benign", config.benign_limit, config.tune.seed).examples
    sets = _test_sets(config, test_on, {_plain(example.text) for example in (*harmful, *benign)})
    check_attacks(ATTACKS if config.stress else (), sets)
    loaded = load_model(config.model, "float32", device)
    base = fingerprint(loaded)
    neurons = _neurons(config, loaded, harmful, benign, progress)
    check(config.arms, loaded.model, neurons)
    lessons, references = read_lessons(loaded, base, harmful, benign, config.tune, config.output, progress)
    held_out = _held_out(lessons, config.held_out)
    kept = [place for place in range(len(lessons)) if place not in held_out]
    train, spared = [lessons[place] for place in kept], [lessons[place] for place in sorted(held_out)]
    return Stage(
        loaded=loaded,
        base=base,
        neurons=neurons,
        harmful=harmful,
        benign=benign,
        train=train,
        held_out=spared,
        references={new: references[old] for new, old in enumerate(kept) if old in references},
        sets=sets,
        classifier=RefusalClassifier.fit([*sample_answers(), *labelled_answers([*harmful, *benign])]),
        digest=key_of(base.weight_digest, neurons.manifest.tensors_digest, train, spared),
    )


def expanded(files: Files) -> Files:
    """Return the files with environment variables in their paths filled in.

    Raises:
        ConfigError: if a variable is not set.
    """
    return Files(**{name: tuple(map(_expanded, getattr(files, name))) for name in Files.model_fields})


def _expanded(path: str) -> str:
    result = os.path.expandvars(path)
    if "$" in result:
        raise ConfigError(f"{path}: the environment variable is not set; set it to the folder of the prompt sets")
    return result


def _neurons(
    config: BenchConfig, loaded: LoadedModel, harmful: Sequence[Example], benign: Sequence[Example], progress: Progress
) -> NeuronSet:
    folder = config.output / "neurons"
    if (folder / KIND.manifest).is_file():
        known = NeuronSet.from_pretrained(folder)
        same_prompts = known.manifest.prompts.digest == digest([*harmful, *benign])
        if same_prompts and known.manifest.base == fingerprint(loaded) and _same_recipe(known, config):
            return known
    found = find(loaded, harmful, benign, config.find, progress=progress)
    return group(found, config.group).save_pretrained(folder)


def _same_recipe(known: NeuronSet, config: BenchConfig) -> bool:
    wanted, grouping = config.find.model_dump(), known.manifest.grouping or {}
    same = all(known.manifest.recipe.get(name, value) == value for name, value in wanted.items())
    return same and all(grouping.get(name, value) == value for name, value in config.group.model_dump().items())


def _held_out(lessons: Sequence[Lesson], count: int) -> set[int]:
    """Return the places of the lessons to keep apart, half of each kind, evenly spread over the files."""
    chosen: set[int] = set()
    for kind in ("refuse", "answer"):
        places = [place for place, lesson in enumerate(lessons) if lesson.kind == kind]
        wanted = min(count // 2, len(places) // 2)
        chosen |= {places[index * len(places) // wanted] for index in range(wanted)} if wanted else set()
    return chosen


def _test_sets(config: BenchConfig, files: Files, tuned_on: set[str]) -> EvalSets:
    """Return the prompts to test on, without those that are, or wrap, a prompt that was tuned on."""
    parts: dict[str, list[Example]] = {
        name: [row for file in getattr(files, name) for row in _unseen(file, tuned_on)]
        for name in ("harmful", "jailbreak", "benign", "borderline")
    }
    tasks = read_tasks(utility_files(files.utility)) if files.utility else []
    return select_sets(config.evaluate, **parts, tasks=tasks)


def _contains(text: str, tuned_on: set[str]) -> bool:
    plain = _plain(text)
    return any(one in plain for one in tuned_on if len(one) > _SHORT or one == plain)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _unseen(file: str, tuned_on: set[str]) -> list[Example]:
    if file == CORPUS:
        raise ConfigError("the corpus cannot be tested on: its pairs stand among the lessons; name files")
    rows = [row for row in read_jsonl(file) if not _contains(row.text, tuned_on)]
    if not rows:
        raise ConfigError(f"{file}: no prompt is left to test on; name a file whose prompts nothing was tuned on")
    return rows
