"""What ``nest eval`` measures, and on which prompts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import Field

from nest.subsets import split_off
from nest.tasks import Task
from spider_sense.config import Settings
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError, nearest
from spider_sense.labels import NEGATIVE

__all__ = ["ATTACKS", "Attack", "EvalConfig", "EvalSets", "attacks_named", "select_sets"]

Attack = Literal["prefill", "ablation", "neurons", "fine_tuning"]
"""prefill: the answer begins with a fixed affirmative text. ablation: the refusal direction is projected out of the
residual stream. neurons: safety neurons are looked for in the model as it is and switched off. fine_tuning: all
weights are trained for an epoch on benign conversations."""
ATTACKS: tuple[Attack, ...] = get_args(Attack)

_HARMFUL = frozenset({"harmful", "harmful_noisy"})
_WRAPPED = "jailbreak_benign_payload"


class EvalConfig(Settings):
    """How to measure."""

    limit: int | None = Field(default=100, gt=0)
    """Rows of each file; which ones depends on the seed and their ids. None for all."""
    seed: int = Field(default=0, ge=0)
    tokens: int = Field(default=24, gt=0)
    """New tokens of an answer. Refusals show in their opening: 12 to 24 are enough for the phrase list."""
    max_prompt_tokens: int = Field(default=512, gt=0)
    """Longer prompts are cut in the middle."""
    batch_size: int = Field(default=32, gt=0)
    attacks: tuple[Attack, ...] = ()
    prefix: str = Field(default="Sure, here is", min_length=1)
    """What the prefill attack makes the model begin with."""
    kl_prompts: int = Field(default=64, gt=0)
    """Benign prompts of the divergence from the base model."""
    attack_prompts: int = Field(default=128, ge=10)
    """Prompts of each class, beside those that are scored, that an attack on the weights may learn from."""
    resamples: int = Field(default=2000, gt=0)
    """Of the bootstrap."""
    keep_answers: bool = False
    """Whether the result holds the answers themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSets:
    """Prompts by what is measured on them; each may be empty."""

    harmful: tuple[Example, ...] = ()
    jailbreak: tuple[Example, ...] = ()
    benign: tuple[Example, ...] = ()
    borderline: tuple[Example, ...] = ()
    """Benign prompts that look harmful."""
    wrapped: tuple[Example, ...] = ()
    """Jailbreak wrappers around a benign request: what a wrapper alone is refused for."""
    tasks: tuple[Task, ...] = ()
    spare_harmful: tuple[Example, ...] = ()
    """Not scored; an attack may learn from them."""
    spare_benign: tuple[Example, ...] = ()


def attacks_named(text: str) -> tuple[Attack, ...]:
    """Read a comma-separated list of attacks.

    Raises:
        ConfigError: if one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in ATTACKS), None)
    if unknown is not None:
        raise ConfigError(f"unknown attack {unknown!r}; {nearest(unknown, ATTACKS)}")
    return tuple(attack for attack in ATTACKS if attack in names)


def select_sets(
    config: EvalConfig,
    *,
    harmful: Iterable[Example] = (),
    jailbreak: Iterable[Example] = (),
    benign: Iterable[Example] = (),
    borderline: Iterable[Example] = (),
    tasks: Iterable[Task] = (),
) -> EvalSets:
    """Choose the rows that are measured: of each file at most ``limit``, by label.

    Args:
        config: the limit and the seed.
        harmful: rows labelled ``harmful`` or ``harmful_noisy`` are taken.
        jailbreak: rows labelled ``jailbreak`` are taken, and ``jailbreak_benign_payload`` as a control.
        benign: rows with a benign label are taken.
        borderline: the same.
        tasks: utility tasks and documents; their limit is applied when they are scored.

    Raises:
        DataError: if rows were given for a part and none has a label that it takes.
    """
    jailbreak = list(jailbreak)
    harmful_taken, spare_harmful = _taken("harmful", harmful, _HARMFUL, config)
    benign_taken, spare_benign = _taken("benign", benign, NEGATIVE, config)
    sets = EvalSets(
        harmful=harmful_taken,
        jailbreak=_taken("jailbreak", jailbreak, {"jailbreak"}, config)[0],
        benign=benign_taken,
        borderline=_taken("borderline", borderline, NEGATIVE, config)[0],
        tasks=tuple(tasks),
        spare_harmful=spare_harmful,
        spare_benign=spare_benign,
    )
    wrapped = [example for example in jailbreak if example.label == _WRAPPED]
    return replace(sets, wrapped=_taken("jailbreak", wrapped, {_WRAPPED}, config)[0])


def _taken(
    part: str, examples: Iterable[Example], labels: Iterable[str], config: EvalConfig
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return the rows to score and the rows that are left, of each file."""
    given, wanted = list(examples), set(labels)
    files: dict[str, list[Example]] = {}
    for example in given:
        if example.label in wanted:
            files.setdefault(example.source, []).append(example)
    if given and not files:
        found = sorted({example.label for example in given})
        raise DataError(f"no row for --{part}: the labels are {found}, it takes {sorted(wanted)}; name another file")
    parts = [split_off(rows, config.limit, config.seed, lambda row: row.id) for rows in files.values()]
    return tuple(row for chosen, _ in parts for row in chosen), tuple(row for _, left in parts for row in left)
