"""From hidden states to a running score: probes, their packed bank, streaming state."""

from spider_sense.scoring.aggregator import Aggregator, Span
from spider_sense.scoring.bank import Bank
from spider_sense.scoring.blocks import BlockStates, TokenChain
from spider_sense.scoring.probe import Probe, SiteMap
from spider_sense.scoring.scorer import Request, RequestRows, Scorer
from spider_sense.scoring.stream import Stream

__all__ = [
    "Aggregator",
    "Bank",
    "BlockStates",
    "Probe",
    "Request",
    "RequestRows",
    "Scorer",
    "SiteMap",
    "Span",
    "Stream",
    "TokenChain",
]
