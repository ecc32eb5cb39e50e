"""What others do about extraction, each as one number that grows with suspicion after every request.

All are compared at the same threshold: conformal, over whole principals of the calibration part.
"""

from spider_sense.extraction.bench.baselines.base import Background, Baseline, Trace
from spider_sense.extraction.bench.baselines.drift import Adwin, PageHinkley
from spider_sense.extraction.bench.baselines.history import NearDuplicates, Prada, RateLimit
from spider_sense.extraction.bench.baselines.level import Coverage, Mahalanobis, Mmd

__all__ = [
    "Adwin",
    "Background",
    "Baseline",
    "Coverage",
    "Mahalanobis",
    "Mmd",
    "NearDuplicates",
    "PageHinkley",
    "Prada",
    "RateLimit",
    "Trace",
]
