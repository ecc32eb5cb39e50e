"""From a log's rows to events: texts become sketches and keyed hashes, and are dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.chat import Turn
from spider_sense.errors import DataError
from spider_sense.extraction.event import Event
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import LinkKind
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.rows import Row
from spider_sense.extraction.sketch import Sketch

__all__ = ["Encoder", "Read", "hidden_of"]

Read = Callable[[Sequence[str | Sequence[Turn]]], NDArray[np.float32]]
"""Runs the model over N prompts and returns their mean hidden states, [N, D]."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns rows into events.

    A row with a sketch keeps it; of one with a hidden state the sketch is projected; for one with text the model is
    run. Without a model, text gives an event without activations, which the rules count as unseen.
    """

    key: Key
    sketch: Sketch
    read: Read | None = None
    lists: KnownLists | None = None

    def encode(self, rows: Sequence[Row]) -> list[Event]:
        """Return an event for each row.

        Raises:
            DataError: if activations have the wrong length.
        """
        hidden = hidden_of(rows, self.read, len(self.sketch.mean))
        have = np.flatnonzero(np.isfinite(hidden[:, 0])) if len(rows) else np.zeros(0, dtype=np.int64)
        sketch_NS, probes_NP = self.sketch.project(hidden[have])
        at = {int(row): place for place, row in enumerate(have)}
        events = []
        for index, row in enumerate(rows):
            sketch: NDArray[np.float32] | None = None
            probes: NDArray[np.float32] | None = None
            if row.sketch is not None:
                sketch = np.array(row.sketch, dtype=np.float32)
                probes = np.array(row.probes or (), dtype=np.float32)
            elif index in at:
                sketch, probes = sketch_NS[at[index]], probes_NP[at[index]]
            events.append(self._event(row, sketch, probes))
        return events

    def _event(self, row: Row, sketch: NDArray[np.float32] | None, probes: NDArray[np.float32] | None) -> Event:
        words = row.words
        return Event(
            principal=row.principal,
            time=row.time,
            sketch=sketch,
            probes=probes,
            tenant=row.tenant,
            opening=0 if words is None else self.key.opening(words),
            parameters=self.key.parameters(row.parameters),
            links=tuple(self._links(row)),
            biased=row.logit_bias,
            top_logprobs=row.top_logprobs,
            max_tokens=row.max_tokens,
            known_list=-1 if self.lists is None or words is None else self.lists.find(words),
        )

    def _links(self, row: Row) -> list[tuple[LinkKind, int]]:
        links: list[tuple[LinkKind, int]] = [(kind, self.key.hash(kind, value)) for kind, value in row.links.items()]
        system = next((message.content for message in row.messages or () if message.role == "system"), None)
        return links if system is None else [*links, ("prefix", self.key.hash("prefix", system))]


def hidden_of(rows: Sequence[Row], read: Read | None, width: int) -> NDArray[np.float32]:
    """Return mean hidden states, [N, D], NaN where there is none.

    Raises:
        DataError: if a row's hidden state has another width.
    """
    hidden_ND = np.full((len(rows), width), np.nan, dtype=np.float32)
    texts = []
    for index, row in enumerate(rows):
        if row.hidden is not None:
            if len(row.hidden) != width:
                raise DataError(
                    f"a request of {row.principal!r} has {len(row.hidden)} hidden numbers, expected {width}"
                )
            hidden_ND[index] = row.hidden
        elif row.sketch is None and row.prompt is not None:
            texts.append(index)
    if read is not None and texts:
        hidden_ND[texts] = read([prompt for index in texts if (prompt := rows[index].prompt) is not None])
    return hidden_ND
