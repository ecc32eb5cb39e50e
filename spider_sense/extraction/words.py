"""Evidence in words, for the human who decides.

Shape letters: F features.
"""

import numpy as np

from spider_sense.extraction.features import FEATURES
from spider_sense.extraction.layout import LISTS, PROBES, States
from spider_sense.extraction.own import leading_direction
from spider_sense.extraction.population import Population

__all__ = ["level_words", "own_words"]


def own_words(population: Population, state_1: States) -> tuple[str, ...]:
    """Say along which direction a principal left its own history."""
    probes = [f"the probe for {name}" for name in population.probe_names]
    names = [
        *probes,
        *[f"probe {place}" for place in range(len(probes), PROBES)],
        "how unusual requests are",
        "how many open alike",
    ]
    direction = names[int(leading_direction(state_1, population.active)[0])]
    at = int(state_1["own_at"][0])
    return (f"requests no longer look like the principal's own earlier ones: {direction} moved, by request {at}",)


def level_words(population: Population, state_1: States) -> tuple[str, ...]:
    """Say which features set a principal apart from honest ones, the strongest first."""
    at = int(state_1["level_at"][0])
    model, features = population.reading(state_1, at)
    if model is None:
        return ()
    parts = model.contributions(features[0])
    order = [index for index in np.argsort(-parts) if parts[index] > 0]
    named = ", ".join(FEATURES[index] for index in order)
    words = [f"after {at} requests the principal looks unlike honest ones; most telling now: {named}"]
    hits = int(state_1["list_hits"].sum())
    if hits:
        words.append(f"{hits} requests stand in one of up to {LISTS} known query lists")
    return tuple(words)
