"""Everything the library raises on purpose.

SpiderSenseError
 |- ConfigError        a YAML file, a command-line value
 |- DataError          a prompt set
 |- SiteError          an unknown architecture, layer or place
 |- GuardError         an artifact that is damaged or made by another version
 |   |- MismatchError  an artifact that belongs to another model, tokenizer or serving configuration
 |- BankError          a bank of signatures that is damaged, or a signature that it does not take
 |- PatchError         a neuron patch, or a set of neurons, that is damaged or does not fit
 |- SignatureError     an artifact whose signature is missing or wrong
 |- StateError         what is kept of a principal is damaged or of another version
 |- RejectedError      a stage of a conversation that screening rejected
 |- MissingExtraError  an optional dependency that is not installed

A message names the bad value, what is allowed, and the next step.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BankError",
    "ConfigError",
    "DataError",
    "GuardError",
    "MismatchError",
    "MissingExtraError",
    "PatchError",
    "RejectedError",
    "SignatureError",
    "SiteError",
    "SpiderSenseError",
    "StateError",
    "nearest",
]


class SpiderSenseError(Exception):
    """Base of all errors raised on purpose; the command line prints it and exits with code 2."""


class ConfigError(SpiderSenseError):
    """A configuration value or command-line argument is wrong."""


class DataError(SpiderSenseError):
    """A prompt set cannot be used as it is."""


class SiteError(SpiderSenseError):
    """A model has no such site, or its architecture is not in the table."""


class GuardError(SpiderSenseError):
    """A guard folder is incomplete, damaged or of another schema version."""


class MismatchError(GuardError):
    """A guard belongs to another model, tokenizer, chat template or serving configuration."""


class BankError(SpiderSenseError):
    """A bank of signatures is incomplete or damaged, or does not take a signature."""


class PatchError(SpiderSenseError):
    """A neuron patch or a set of neurons is incomplete, damaged, or does not fit the model or what was done to it."""


class SignatureError(SpiderSenseError):
    """A guard's signature is missing or does not match its files."""


class StateError(SpiderSenseError):
    """What is kept of a principal is damaged, or of another version, key or artifact."""


class RejectedError(SpiderSenseError):
    """Screening rejected a stage of a conversation."""

    def __init__(self, stage: str, evidence: str) -> None:
        super().__init__(f"screening rejected the {stage}: {evidence}")
        self.stage, self.evidence = stage, evidence


class MissingExtraError(SpiderSenseError):
    """A feature needs an optional dependency."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run, in the checkout: pip install '.[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the tail of an error message: the closest known name, if any, and all known names."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
