"""All texts that a bench may send, known before any stream is made: they are read by the served model once."""

from collections.abc import Iterable, Sequence

from spider_sense.extraction.bench.config import BenchConfig
from spider_sense.extraction.bench.scene import families_with_real_apps
from spider_sense.extraction.simulator.adversaries import batched, paraphrased
from spider_sense.extraction.simulator.families import Family, load_families, real_streams

__all__ = ["BATCH", "every_text", "load_material"]

BATCH = 4
"""Questions that an attacker puts into one request."""

People = tuple[tuple[str, tuple[str, ...]], ...]


def load_material(config: BenchConfig) -> tuple[tuple[Family, ...], People]:
    """Return the families and the real people that a bench draws from.

    Without a folder of prompt sets both are the shipped ones, and nobody is real.
    """
    data = config.data()
    families = load_families(config.texts, data, config.longest)
    real = real_streams(data) if data else {}
    families, people = families_with_real_apps(families, real, config.texts)
    cut = tuple((name, tuple(_short(said, config.longest))[: config.real_messages]) for name, said in people)
    return families, cut[: config.real_principals]


def every_text(config: BenchConfig, families: Sequence[Family], people: People) -> list[str]:
    """Return the distinct texts of all streams of all seeds, those of attackers that adapt included."""
    found: dict[str, None] = {}
    for family in families:
        found |= dict.fromkeys(family.wrapped())
        if family.kind == "campaign" and config.adaptive:
            found |= dict.fromkeys(paraphrased(family, 0))
            found |= dict.fromkeys(batched(family.texts, BATCH))
    for _, said in people:
        found |= dict.fromkeys(said)
    return list(found)


def _short(said: Iterable[str], longest: int) -> Iterable[str]:
    return (text[:longest] for text in said)
