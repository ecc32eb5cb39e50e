"""The detector of this library as a system under comparison.

Shape letters: N streams, T requests.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.bench.encode import Encoder
from spider_sense.extraction.bench.systems import Alarm, first_above
from spider_sense.extraction.decision import LEVELS, Tier
from spider_sense.extraction.groups import Group, honest_groups, judged
from spider_sense.extraction.population import Population
from spider_sense.extraction.simulator.adversaries import partitioned
from spider_sense.extraction.simulator.traffic import Request, Stream
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.thresholds import Calibration
from spider_sense.extraction.tiers import Replay, TieredDetector

__all__ = ["Ours"]

_TOGETHER = 400
"""Streams whose events are held at once."""
_LIMIT = LEVELS.index("limit") + 1


class Ours:
    """Calibrated on streams of their own part.

    Args:
        encoder: makes events of streams.
        population: fitted on other streams.
        calibration: innocent streams that thresholds are set on.
        organisations: innocent groups that the group tier's threshold is set on; empty leaves it infinite.
        width: of the model's hidden state.
    """

    name = "spider-sense"

    def __init__(
        self,
        encoder: Encoder,
        population: Population,
        calibration: Sequence[Stream],
        organisations: Sequence[Sequence[Stream]],
        width: int,
    ) -> None:
        self._encoder = encoder
        self.detector = TieredDetector(population, None, encoder.key, width)
        parts = [(replay.states["own"], replay.states["level"]) for replay in self._replays(calibration)]
        own, level = (np.concatenate(column) for column in zip(*parts, strict=True))
        accounts = self.states([stream for group in organisations for stream in group])
        # Who asks several families does no work that a whole group could do.
        work = {
            stream.principal: stream.principal if "+" in stream.family else stream.family
            for group in organisations
            for stream in group
        }
        lives = np.array([len(stream) for stream in calibration])
        found = Calibration.fit(
            own,
            level,
            [stream.tenant for stream in calibration],
            lives,
            [stream.family for stream in calibration],
            groups=honest_groups(accounts, population, work),
            floors=population.floors,
        )
        self.detector = TieredDetector(population, found, encoder.key, width)

    def alarms(self, streams: Sequence[Stream]) -> list[Alarm | None]:
        """Return the first alarm of each stream by any tier that sees one principal alone."""
        found: list[Alarm | None] = []
        for by_tier, watched in self._crossings(streams):
            counts = {tier: count for tier, count in by_tier.items() if count}
            first = min(counts, key=lambda tier: counts[tier], default=None)
            # Own history limits from where the level is high too.
            both = {"own": max(counts["own"], watched)} if "own" in counts and watched else {}
            limits = {tier: count for tier, count in counts.items() if tier != "own"} | both
            found.append(None if first is None else Alarm(counts[first], first, min(limits.values(), default=None)))
        return found

    def alarms_by_tier(self, streams: Sequence[Stream]) -> list[dict[Tier, int]]:
        """Return the request, from 1, at which each tier first alarmed, 0 for never."""
        return [by_tier for by_tier, _ in self._crossings(streams)]

    def _crossings(self, streams: Sequence[Stream]) -> Iterator[tuple[dict[Tier, int], int]]:
        """Yield the same for each stream, and where its level was first watched."""
        detector = self.detector
        for place, replay in enumerate(self._replays(streams)):
            for row, stream in enumerate(streams[place * _TOGETHER : (place + 1) * _TOGETHER]):
                by_tier: dict[Tier, int] = {
                    "rule": first_above(replay.rule_NT[row], _LIMIT - 1),
                    "own": first_above(replay.own_NT[row], detector.threshold("own", stream.tenant)),
                    "level": first_above(replay.level_NT[row], detector.threshold("level", stream.tenant)),
                }
                yield by_tier, first_above(replay.level_NT[row], detector.watch("level", stream.tenant))

    def windows(self, texts: Sequence[str], windows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        """Return the level tier's score of windows, [M], each given as rows of the texts: one principal's life each,
        with nothing but its texts to go by."""
        streams = [
            Stream(
                principal=f"window {place}",
                tenant="",
                family="",
                requests=tuple(Request(text=texts[row], time=float(turn)) for turn, row in enumerate(rows)),
            )
            for place, rows in enumerate(windows)
        ]
        return np.concatenate([replay.states["level"] for replay in self._replays(streams)])

    def topics(self, texts: Sequence[str], parts: int) -> Sequence[Sequence[str]]:
        """Return texts by topic, as an attacker would part them who sees the sketches."""
        return partitioned(texts, self._encoder.sketches(texts), parts, seed=0)

    def groups(self, states: Mapping[str, PrincipalState]) -> list[tuple[Group, str, float]]:
        """Return the groups that are found by linking accounts, the tenant type each is judged by, and its score.

        Args:
            states: of innocent and other accounts alike, by principal; who belongs to whom is not told.
        """
        return judged(states, self.detector.population)

    def states(self, streams: Sequence[Stream]) -> Mapping[str, PrincipalState]:
        """Return the state of each stream's principal at its end."""
        if not streams:
            return {}
        found = np.concatenate([replay.states for replay in self._replays(streams)])
        return {stream.principal: PrincipalState(found[row : row + 1]) for row, stream in enumerate(streams)}

    def _replays(self, streams: Sequence[Stream]) -> Iterator[Replay]:
        for first in range(0, len(streams), _TOGETHER):
            yield self.detector.replay(self._encoder.all(streams[first : first + _TOGETHER]))
