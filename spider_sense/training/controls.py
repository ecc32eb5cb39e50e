"""Controls that could explain a probe's result away.

Every control is fitted on the probe's own training part and measured on the same test rows: text length, TF-IDF, the
best of 100 random directions, and the same probe trained on shuffled labels. The last two are probes themselves and go
through the same bank and fold as the guard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from spider_sense.baselines import LengthBaseline, TfidfBaseline, best_random_direction, shuffled_labels
from spider_sense.data import Example
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.training.families import fit
from spider_sense.training.options import FitOptions
from spider_sense.training.sweep import Task
from spider_sense.types import Site

__all__ = ["Controls"]

DIRECTIONS = 100


@dataclass(frozen=True, slots=True)
class Controls:
    """Fitted controls of one detector."""

    length: LengthBaseline
    tfidf: TfidfBaseline
    probes: tuple[Probe, ...]
    """The random direction and the shuffled labels, named ``detector.control``."""

    @classmethod
    def fit(cls, examples: Sequence[Example], task: Task, chosen: Probe, options: FitOptions) -> "Controls":
        """Fit all controls on the training part of a task.

        Args:
            examples: all conversations of the task.
            task: labels and parts.
            chosen: the probe that was chosen; shuffled labels are fitted the same way.
            options: as for the chosen probe.
        """
        texts = [examples[index].text for index in task.train]
        labels = task.labels.copy()
        labels[task.train] = shuffled_labels(task.labels[task.train], options.seed)
        name = f"{task.name}.shuffled_labels"
        return cls(
            LengthBaseline.fit(texts, task.labels[task.train]),
            TfidfBaseline.fit(texts, task.labels[task.train]),
            (
                _random_direction(task, next(iter(chosen.maps)), options.seed),
                replace(
                    fit(chosen.family, task.data, task.train, labels, tuple(chosen.maps), name, options),
                    family="shuffled_labels",
                ),
            ),
        )


def _random_direction(task: Task, site: Site, seed: int) -> Probe:
    """Return the random direction at a site that does best on the training part, as a probe on the mean token."""
    data, position, means = task.data, task.data.sites.index(site), []
    for index in task.train:
        start = int(data.starts[index])
        rows_nD = data.hidden[start : start + int(data.prompt_rows[index]), position].float()
        means.append(rows_nD.mean(0).numpy())
    weight_D, bias = best_random_direction(np.stack(means), task.labels[task.train], DIRECTIONS, seed)
    site_map = SiteMap(torch.from_numpy(weight_D).float()[:, None], torch.tensor([bias]).float())
    return Probe(f"{task.name}.random_direction", "random_direction", Aggregator(kind="mean"), {site: site_map})
