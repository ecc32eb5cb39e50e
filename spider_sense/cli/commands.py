"""Imports every verb, which registers it."""

from spider_sense.cli import bench, demo, evaluate, generate, train

__all__ = ["bench", "demo", "evaluate", "generate", "train"]
