"""Imports every verb, which registers it."""

from spider_sense.cli import evaluate, train

__all__ = ["evaluate", "train"]
