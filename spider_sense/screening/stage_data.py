"""What one probe of a stage is fitted and measured on.

Shape letters: N conversations, P sites, D width, H probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spider_sense.activations import ActivationSet
from spider_sense.errors import ConfigError
from spider_sense.scoring import Probe
from spider_sense.screening.drift import DRIFT, drift, opening
from spider_sense.screening.message import Message
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.stage_example import StageExample
from spider_sense.screening.stage_sets import drift_set, span_set

__all__ = ["StageData", "owner", "stage_data"]


def owner(group: str) -> str:
    """Return whose a group is, such as an agent's: its name up to a slash."""
    return group.partition("/")[0]


@dataclass(frozen=True, slots=True, eq=False)
class StageData:
    """The examples of a stage with their activations, N of them."""

    name: str
    """The stage, or ``drift``."""
    examples: tuple[StageExample, ...]
    data: ActivationSet
    """One row each, see `spider_sense.screening.stage_sets`."""
    tokens: np.ndarray
    """Length of each span, int64 [N], by which thresholds are chosen."""

    @property
    def labels(self) -> np.ndarray:
        """True for an attack, bool [N]."""
        return np.array([item.positive for item in self.examples])

    @property
    def sources(self) -> np.ndarray:
        """Source of each, [N]."""
        return np.array([item.example.source for item in self.examples])

    @property
    def groups(self) -> list[str]:
        """What each belongs to, N names: a context, a pair, an agent and a row of its, or itself alone."""
        return [item.example.group for item in self.examples]

    @property
    def owners(self) -> list[str]:
        """The owner of each group, which a split keeps together, N names."""
        return [owner(group) for group in self.groups]

    @property
    def texts(self) -> list[str]:
        """The spans' texts, for the controls."""
        return [item.example.text for item in self.examples]

    def scores(self, probes: Sequence[Probe], which: np.ndarray) -> np.ndarray:
        """Score some of them, [len(which), H] float64.

        Unlike a bank this does not divide by the root mean square: the rows are means of what was divided already.
        """
        rows_NPD, columns = self.data.hidden[torch.from_numpy(which)].double(), []
        for probe in probes:
            places = self.data.site_index(tuple(probe.maps))
            parts = [
                rows_NPD[:, place] @ part.weight[:, 0].double() + part.bias[0].double()
                for place, part in zip(places, probe.maps.values(), strict=True)
            ]
            columns.append(torch.stack(parts).sum(0))
        return torch.stack(columns, 1).numpy()


def stage_data(name: str, examples: Sequence[StageExample], data: ActivationSet, tokenizer: Any) -> StageData:
    """Cut captured conversations to what a probe reads.

    Args:
        name: a stage, or ``drift``, which reads observations.
        examples: what was captured, in the order of ``data``.
        data: their activations.
        tokenizer: what they were rendered with.

    Raises:
        ConfigError: if an example does not end with its stage, or the template opens no turn to compare.
    """
    reader, opens = ChatSpans(tokenizer), opening(tokenizer)
    chosen, spans, places = [], [], []
    for index, item in enumerate(examples):
        if item.stage != ("observation" if name == DRIFT else name):
            continue
        turns = item.example.turns or ()
        conversation = reader.read([Message.parse({"role": role, "content": content}) for role, content in turns])
        span = conversation.spans[-1]
        compared = drift(conversation.ids, span, opens)
        if span.stage != item.stage or (name == DRIFT and compared is None):
            raise ConfigError(f"{item.example.id} ends with {span.stage}, and nothing can be compared around it")
        chosen.append(index)
        spans.append(slice(span.start, span.stop))
        if compared is not None:
            places.append(compared)
    cut = drift_set(data, chosen, places) if name == DRIFT else span_set(data, chosen, spans)
    tokens = np.array([span.stop - span.start for span in spans], dtype=np.int64)
    return StageData(name, tuple(examples[index] for index in chosen), cut, tokens)
