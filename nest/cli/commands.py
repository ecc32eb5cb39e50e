"""Imports every verb, which registers it."""

from nest.cli import apply, compare, diff, evaluate, export, find, group, merge, revert

__all__ = ["apply", "compare", "diff", "evaluate", "export", "find", "group", "merge", "revert"]
