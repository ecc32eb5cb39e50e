"""The command line ``nest``."""

from nest.cli.app import main

__all__ = ["main"]
