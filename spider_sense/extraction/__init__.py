"""Who is distilling this model: evidence per principal and across linked principals.

What is bounded is the share of honest principals that are ever alarmed. Extraction is made dearer, not impossible.
"""

from spider_sense.extraction.decision import Decision, Level, Tier
from spider_sense.extraction.detector import Detector
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.keys import Key
from spider_sense.extraction.state import PrincipalState

__all__ = ["Decision", "Detector", "Event", "EventBatch", "Key", "Level", "PrincipalState", "Tier"]
