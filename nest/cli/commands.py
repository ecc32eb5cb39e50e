"""Imports every verb, which registers it."""

from nest.cli import apply, diff, export, find, group, merge, revert

__all__ = ["apply", "diff", "export", "find", "group", "merge", "revert"]
