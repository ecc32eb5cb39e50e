"""A runtime safeguard and activation monitor for self-hosted language models.

Names are imported when they are first used, so ``import spider_sense`` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spider_sense.audit import AuditLog
    from spider_sense.capture import Capture
    from spider_sense.errors import SpiderSenseError
    from spider_sense.guard import Guard
    from spider_sense.monitor import Monitor
    from spider_sense.policy import Policy
    from spider_sense.types import Coverage, Site, Verdict

__all__ = ["AuditLog", "Capture", "Coverage", "Guard", "Monitor", "Policy", "Site", "SpiderSenseError", "Verdict"]

_HOME = {
    "AuditLog": "audit",
    "Capture": "capture",
    "Coverage": "types",
    "Guard": "guard",
    "Monitor": "monitor",
    "Policy": "policy",
    "Site": "types",
    "SpiderSenseError": "errors",
    "Verdict": "types",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'spider_sense' has no attribute {name!r}")
    return getattr(import_module(f"spider_sense.{_HOME[name]}"), name)
