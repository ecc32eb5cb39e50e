"""Imports every verb, which registers it."""

from nest.cli import apply, bench, compare, diff, evaluate, export, find, group, merge, revert, tune

__all__ = ["apply", "bench", "compare", "diff", "evaluate", "export", "find", "group", "merge", "revert", "tune"]
