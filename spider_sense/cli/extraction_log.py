"""The logs that ``spider-sense extraction`` is given, checked before the model is loaded that reads them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spider_sense.cli.progress import progress_bars
from spider_sense.errors import ConfigError

if TYPE_CHECKING:
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.encode import Read
    from spider_sense.extraction.keys import Key
    from spider_sense.extraction.rows import Row
    from spider_sense.models import LoadedModel
    from spider_sense.types import Site

__all__ = ["Opened", "Reading", "log_width", "open_log", "read_logs"]


@dataclass(frozen=True, slots=True)
class Reading:
    """The model that reads a log, if any does."""

    model: str | None
    dtype: str
    device: str

    def check(self, site: "Site") -> None:
        """Check that the model has the layer of a site, by its configuration.

        Raises:
            SiteError: if it has not.
        """
        from spider_sense.models import layers_of
        from spider_sense.sites import check_layer

        if self.model is not None:
            check_layer(site, layers_of(self.model))

    def load(self) -> "LoadedModel | None":
        """Load it."""
        from spider_sense.models import load_model

        return None if self.model is None else load_model(self.model, self.dtype, self.device)


@dataclass(frozen=True, slots=True)
class Opened:
    """An extraction guard, its key, and a log to read under it."""

    artifact: "Artifact"
    key: "Key"
    rows: "list[Row]"
    reading: Reading

    def reader(self) -> "Read | None":
        """Load the model, check that it is the guard's own, and return what reads prompts with it.

        Raises:
            MismatchError: if it is another one.
        """
        from spider_sense.fingerprint import fingerprint

        loaded = self.reading.load()
        if loaded is not None:
            self.artifact.check_model(fingerprint(loaded))
        return reader_of(loaded, self.artifact.site, self.rows)


def open_log(guard: Path, key: Path, data: list[Path], reading: Reading) -> Opened:
    """Read all but the model, and check that they belong together.

    Raises:
        SpiderSenseError: if they do not, or one cannot be used.
    """
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.checks import check_widths
    from spider_sense.extraction.keys import Key

    artifact, secret, rows = Artifact.from_pretrained(guard), Key.read(key), read_logs(data)
    artifact.check_key(secret)
    check_widths(rows, artifact.width, len(artifact.sketch.names))
    unread = 0 if reading.model else sum(row.hidden is None and row.sketch is None for row in rows)
    if unread:
        typer.echo(
            f"warning: {unread} of {len(rows)} requests have no activations and no model reads them; "
            "only the rules and the counters see those",
            err=True,
        )
    return Opened(artifact, secret, rows, reading)


def read_logs(paths: list[Path]) -> "list[Row]":
    """Read logs one after the other."""
    from spider_sense.extraction.rows import read_rows

    return [row for path in paths for row in read_rows(path)]


def reader_of(loaded: "LoadedModel | None", site: "Site", rows: "Sequence[Row]") -> "Read | None":
    """Return what reads prompts, None without a model.

    Raises:
        DataError: if the model could not have been asked what the rows say.
    """
    if loaded is None:
        return None
    from spider_sense.cli.model_reader import ModelReader

    reader = ModelReader(loaded, site, _shown)
    reader.check(rows)
    return reader


@contextmanager
def _shown(total: int) -> Iterator[Callable[[int], None]]:
    with progress_bars() as progress:
        bar = progress.add_task("Reading prompts", total=total)
        yield lambda count: progress.advance(bar, count)


def log_width(rows: "Sequence[Row]", loaded: "LoadedModel | None") -> int:
    """Return the width of the hidden states that a fit reads."""
    if loaded is not None:
        return int(loaded.model.config.get_text_config().hidden_size)
    width = next((len(row.hidden) for row in rows if row.hidden is not None), None)
    if width is None:
        raise ConfigError("no row has a hidden state; name a model that reads their text with --model")
    return width
