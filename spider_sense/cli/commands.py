"""Imports every verb, which registers it."""

from spider_sense.cli import bench, calibrate, demo, evaluate, generate, inspect, sign, train

__all__ = ["bench", "calibrate", "demo", "evaluate", "generate", "inspect", "sign", "train"]
