"""The report as data: everything that the page shows, and nothing about how it looks.

Numbers of a guard's manifest are checked here, since the page writes them without escaping.
"""

from spider_sense.calibration import Calibration
from spider_sense.folders import Record
from spider_sense.types import Action, Zone

__all__ = ["Conversation", "DetectorFacts", "GuardFacts", "Rate", "Report", "SweepPoint", "System", "Token", "Track"]


class Rate(Record):
    """A share and its 95% interval; None where there was nothing to measure."""

    value: float | None
    low: float | None
    high: float | None


class System(Record):
    """The guard or one of its controls, measured on the test part."""

    name: str
    auroc: float | None
    log_auroc: float | None
    tpr: Rate
    """At 1% false positives."""
    roc: tuple[tuple[float, float], ...]
    """(false-positive rate, true-positive rate), both rising; empty if the guard keeps no curve."""

    @property
    def title(self) -> str:
        """The name as people write it."""
        return "TF-IDF" if self.name == "tfidf" else self.name.replace("_", " ")


class SweepPoint(Record):
    """One candidate of the sweep, measured on the validation part."""

    family: str
    sites: tuple[str, ...]
    tpr: float
    """At 1% false positives."""
    auroc: float
    chosen: bool
    """Whether the guard's detector is of this family and at these sites."""


class DetectorFacts(Record):
    """What the manifest says of one detector."""

    name: str
    family: str
    sites: tuple[str, ...]
    aggregator: str
    calibration: Calibration
    systems: tuple[System, ...]
    """The guard first; empty if the manifest holds no evidence."""
    n: int
    """Test prompts."""
    positives: int
    gain: Rate | None
    """Difference of TPR at 1% FPR to TF-IDF; ``value`` is the bootstrap mean."""
    beats_tfidf: bool | None
    warning: str | None
    candidates: tuple[SweepPoint, ...]
    """Best first."""


class GuardFacts(Record):
    """What the manifest says of the guard as a whole."""

    model: str
    architecture: str
    layers: int
    digest: str
    certified: tuple[str, ...]
    signed: bool
    """Whether the folder holds a signature; it is not verified here."""
    sources: tuple[str, ...]
    test_sources: tuple[str, ...]


class Token(Record):
    """One token of a conversation as one detector reads it; numbers are None where nothing was scored."""

    text: str
    position: int
    response: bool
    logit: float | None
    """Token logit: the sum of the probe's value columns."""
    contribution: float | None
    """See :func:`spider_sense.reporting.contribution.contributions`."""
    readout: float | None
    """Running readout after the token, from the last prompt token on."""


class Track(Record):
    """One detector on one conversation."""

    detector: str
    meaning: str
    """What a token's contribution means, in words."""
    zone: Zone
    peak: float
    suspect: float
    breach: float
    tokens: tuple[Token, ...]
    """Without the template's head."""


class Conversation(Record):
    """One prompt, the model's own answer, and what every detector says."""

    name: str
    label: str | None
    """As the prompt set says it."""
    skipped: int
    """Tokens of the template's head, which are not scored."""
    missing: int
    action: Action
    """What the default policy would have done."""
    tracks: tuple[Track, ...]
    """In the order of the guard's detectors."""
    difference: float
    """Largest difference of streamed and whole-sequence readouts, divided by max(1, |readout|)."""


class Report(Record):
    """A whole report."""

    created: str
    """ISO date and time, UTC."""
    guard: GuardFacts
    detectors: tuple[DetectorFacts, ...]
    serving: str
    """How the model was served for this report."""
    origin: str
    """Where the conversations come from, in words."""
    conversations: tuple[Conversation, ...]
    summaries: tuple[str, ...]
    """One line a detector in plain words."""
    limits: tuple[str, ...]
    """What the numbers do not show."""

    @property
    def difference(self) -> float:
        """The largest difference of streamed and whole-sequence readouts over all conversations."""
        return max((item.difference for item in self.conversations), default=0.0)
