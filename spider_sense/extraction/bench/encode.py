"""From simulated requests to the events that the detector reads.

Everything that depends on a text alone is computed once a text.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.event import Event
from spider_sense.extraction.keys import Key
from spider_sense.extraction.simulator.traffic import Stream

__all__ = ["Encoder"]

Floats = NDArray[np.float32]


class Encoder:
    """Turns streams into events.

    Args:
        key: of all hashes.
        index: row of each text.
        sketch_NS: of each text.
        probes_NP: of each text.
        tokens: of each text, [N].
    """

    def __init__(
        self,
        key: Key,
        index: Mapping[str, int],
        sketch_NS: Floats,
        probes_NP: Floats,
        tokens: NDArray[np.int64],
    ) -> None:
        self.key, self._index = key, index
        self.sketch_NS, self.probes_NP, self._tokens = sketch_NS, probes_NP, tokens.tolist()
        self._edges: dict[str, tuple[int, int]] = {}

    def sketches(self, texts: Sequence[str]) -> Floats:
        """Return the sketches of texts, [M, S]."""
        return self.sketch_NS[[self._index[text] for text in texts]]

    def events(self, stream: Stream) -> list[Event]:
        """Return the events of a stream."""
        links = tuple((kind, self.key.hash(kind, value)) for kind, value in stream.links)
        parameters = self.key.parameters(dict(stream.parameters))
        events = []
        for request in stream.requests:
            row = self._index[request.text]
            if request.text not in self._edges:
                self._edges[request.text] = self.key.edges(request.text)
            opening, closing = self._edges[request.text]
            events.append(
                Event(
                    principal=stream.principal,
                    time=request.time,
                    sketch=self.sketch_NS[row],
                    probes=self.probes_NP[row],
                    tenant=stream.tenant,
                    opening=opening,
                    closing=closing,
                    parameters=parameters,
                    links=links,
                    tokens=self._tokens[row],
                    turn=request.turn,
                    questions=request.questions,
                    biased=request.biased,
                    top_logprobs=request.top_logprobs,
                    max_tokens=request.max_tokens,
                )
            )
        return events

    def all(self, streams: Sequence[Stream]) -> list[list[Event]]:
        """Return the events of each stream."""
        return [self.events(stream) for stream in streams]
