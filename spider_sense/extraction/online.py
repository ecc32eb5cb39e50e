"""What is opened where a model is served: the extraction guard, its key, and the store of principals."""

import atexit
from dataclasses import replace
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.feed import Feed
from spider_sense.extraction.keys import Key
from spider_sense.extraction.observation import Reader
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.extraction.stores import Store, open_store
from spider_sense.extraction.turns import Turns
from spider_sense.extraction.watch import Watch
from spider_sense.scoring import Probe

__all__ = ["heads_of", "open_claimed", "open_watch", "read_artifact"]


def read_artifact(settings: ExtractionSettings) -> Artifact:
    """Read the extraction guard.

    Raises:
        GuardError: if it is missing or damaged.
        ConfigError: if it has no thresholds.
    """
    artifact = Artifact.from_pretrained(settings.detector)
    if artifact.calibration is None:
        raise ConfigError(
            f"{settings.detector} has no thresholds, so nothing it finds has a bounded rate of false alarms; run "
            "`spider-sense extraction calibrate` first"
        )
    return artifact


def heads_of(artifact: Artifact) -> tuple[Probe, ...]:
    """Return what an engine's bank computes for it, after the guard's own heads."""
    return tuple(artifact.sketch.heads(artifact.site))


def open_claimed(settings: ExtractionSettings, artifact: Artifact, make: bool = True) -> Store:
    """Open the store, for states that this artifact makes, whatever its thresholds are.

    Args:
        settings: where it is.
        artifact: the extraction guard.
        make: whether to make it if it is not there.

    Raises:
        MismatchError: if the key is not that of the artifact.
        StoreError: if the store cannot be opened, or holds states of another one.
    """
    artifact.check_key(Key.read(settings.key))
    store = open_store(settings.store, make=make)
    try:
        # It names the key too. Neither thresholds nor who was fitted on change what a state means.
        store.claim(replace(artifact, calibration=None, fitted=frozenset()).digest)
    except BaseException:
        store.close()
        raise
    return store


def open_watch(settings: ExtractionSettings, tokenizer: Any) -> Watch:
    """Begin to watch; what waits when the process ends is folded then.

    Args:
        settings: where everything is.
        tokenizer: of the served model, with a chat template.

    Raises:
        SpiderSenseError: if something cannot be opened, or does not fit.
    """
    artifact, key = read_artifact(settings), Key.read(settings.key)
    reader = Reader(key, Turns(tokenizer), settings.tenants, artifact.lists)
    store = open_claimed(settings, artifact)
    try:
        feed = Feed(store, artifact.detector(key), reader, settings)
    except BaseException:
        store.close()
        raise
    atexit.register(feed.close)
    return Watch(feed, heads_of(artifact))
