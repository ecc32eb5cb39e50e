"""Imports every verb, which registers it."""

from spider_sense.cli import (
    bench,
    calibrate,
    demo,
    evade,
    evaluate,
    extraction,
    generate,
    inspect,
    principals,
    report,
    serve,
    sign,
    train,
)

__all__ = [
    "bench",
    "calibrate",
    "demo",
    "evade",
    "evaluate",
    "extraction",
    "generate",
    "inspect",
    "principals",
    "report",
    "serve",
    "sign",
    "train",
]
