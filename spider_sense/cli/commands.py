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
    screen,
    serve,
    sign,
    signatures,
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
    "screen",
    "serve",
    "sign",
    "signatures",
    "train",
]
