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
    """

    def __init__(
        self,
        key: Key,
        index: Mapping[str, int],
        sketch_NS: Floats,
        probes_NP: Floats,
    ) -> None:
        self.key, self._index = key, index
        self.sketch_NS, self.probes_NP = sketch_NS, probes_NP
        self._openings: dict[str, int] = {}

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
            if request.text not in self._openings:
                self._openings[request.text] = self.key.opening(request.text)
            events.append(
                Event(
                    principal=stream.principal,
                    time=request.time,
                    sketch=self.sketch_NS[row],
                    probes=self.probes_NP[row],
                    tenant=stream.tenant,
                    opening=self._openings[request.text],
                    parameters=parameters,
                    links=links,
                    biased=request.biased,
                    top_logprobs=request.top_logprobs,
                    max_tokens=request.max_tokens,
                )
            )
        return events

    def all(self, streams: Sequence[Stream]) -> list[list[Event]]:
        """Return the events of each stream."""
        return [self.events(stream) for stream in streams]
