"""From a log's rows to events: texts become sketches and keyed hashes, and are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spider_sense.chat import Turn
from spider_sense.errors import DataError
from spider_sense.extraction.event import Event
from spider_sense.extraction.hashes import Hashes
from spider_sense.extraction.keys import Key
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.rows import Row
from spider_sense.extraction.sketch import Sketch
from spider_sense.extraction.turns import Parts

__all__ = ["Encoder", "Prompt", "Read", "hidden_of"]

Prompt = str | Sequence[Turn]
"""A text of a single user's turn, or a conversation."""


class Read(Protocol):
    """Reads prompts as the server of a model does."""

    def __call__(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Run the model over N prompts and return the mean of ``h / rms(h)`` over each one's tokens, [N, D]."""
        ...

    def parts(self, prompt: Prompt) -> Parts:
        """Render a prompt and take it apart again."""
        ...


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns rows into events.

    A row with a sketch keeps it; of one with a hidden state the sketch is projected; for one with text the model is
    run. Without a model, text gives an event without activations, which the rules count as unseen, and texts are hashed
    as they stand in the log, not as the template renders them.
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
        hashes = self._hashes(row)
        return Event(
            principal=row.principal,
            time=row.time,
            sketch=sketch,
            probes=probes,
            tenant=row.tenant,
            opening=hashes.opening,
            parameters=self.key.parameters(row.parameters),
            links=(*((kind, self.key.hash(kind, value)) for kind, value in row.links.items()), *hashes.links),
            biased=row.logit_bias,
            top_logprobs=row.top_logprobs,
            max_tokens=row.max_tokens,
            choices=row.n,
            known_list=hashes.known_list,
        )

    def _hashes(self, row: Row) -> Hashes:
        if row.prompt is None:
            return Hashes()
        parts = Parts(row.system, row.words) if self.read is None else self.read.parts(row.prompt)
        return Hashes.of(parts, self.key, self.lists)


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
