"""The command line; every verb is a thin shell over the library."""

from spider_sense.cli.app import main

__all__ = ["main"]
