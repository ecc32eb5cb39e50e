"""Prompts on their way to whoever watches for extraction.

Shape letters: B requests, H heads.
"""

from collections.abc import Sequence

from spider_sense.case import Case
from spider_sense.extraction.feed_counts import FeedNote
from spider_sense.extraction.observation import Asked
from spider_sense.extraction.watch import Heard, Watch
from spider_sense.scoring import Probe, RequestRows, Scorer
from spider_sense.types import UNKNOWN

__all__ = ["WatchedPrompts"]


class WatchedPrompts:
    """Tells a watch of each prompt once it has been read whole, and requests how their principals stand.

    Args:
        watch: looks for extraction; None where nobody does.
    """

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self.probes: tuple[Probe, ...] = watch.probes if watch else ()
        """What reads the prompts, beside the guard's own probes."""
        self.unread: dict[int, Case] = {}
        """Requests whose prompt has not been read whole, by slot."""

    @property
    def watched(self) -> bool:
        """Whether extraction is watched for."""
        return self._watch is not None

    def begin(self, case: Case, prompt: Sequence[int], asked: Asked | None) -> None:
        """Note how the principal of a new request stands.

        Args:
            case: the request.
            prompt: its token ids.
            asked: how it was asked for; None of one that the watch is not to hear of.
        """
        if self._watch is None:
            return
        case.standing = self._watch.standing(case.request.principal or UNKNOWN)
        if asked is not None:
            case.prompt, case.asked = prompt, asked
            self.unread[case.request.slot] = case

    def tell(self, rows: Sequence[RequestRows], scorer: Scorer, heads: int) -> None:
        """Tell of the prompts that a step has completed.

        Args:
            rows: of the step.
            scorer: has folded them.
            heads: those of the guard, which come before the watch's.
        """
        assert self._watch is not None
        read = {item.request.slot for item in rows if item.request.position >= item.request.prompt_length}
        done = [self.unread.pop(slot) for slot in read & self.unread.keys()]
        if done:
            readout_BH = scorer.stream.readout([case.request.slot for case in done])
            self._watch.tell([_heard(case) for case in done], readout_BH[:, heads:])

    def forget(self, case: Case) -> None:
        """Tell nothing of a request that ends before its prompt was read."""
        self.unread.pop(case.request.slot, None)

    def take_counts(self) -> FeedNote | None:
        """Return what became of the requests that the watch was told of since the last call, None if nothing."""
        return None if self._watch is None else self._watch.feed.counts.take()


def _heard(case: Case) -> Heard:
    assert case.asked is not None
    principal = case.request.principal or UNKNOWN
    return Heard(principal, tuple(case.prompt), case.asked, whole=not case.request.missing)
