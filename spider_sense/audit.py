"""The audit log: an append-only file with one JSON object a line for every event.

A number that JSON has no word for is written as the string ``"nan"``, ``"inf"`` or ``"-inf"``, so every line is valid
JSON; ``AuditEvent.model_validate_json`` reads it back. Lines are pure ASCII. Prompt text is left out unless asked for.
"""

import json
import math
import os
import threading
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer

from spider_sense.errors import ConfigError
from spider_sense.types import Action, Coverage, Zone

__all__ = ["AuditEvent", "AuditLog", "EventKind"]

EventKind = Literal["open", "verdict", "action", "close"]


def _in_utc(time: datetime) -> datetime:
    return time.astimezone(UTC)


def _plain(score: float | None) -> float | str | None:
    return score if score is None or math.isfinite(score) else str(score)


Score = Annotated[float | None, PlainSerializer(_plain, when_used="json")]


class AuditEvent(BaseModel):
    """One line of the audit log; what does not apply to an event is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: Annotated[AwareDatetime, AfterValidator(_in_utc)] = Field(default_factory=lambda: datetime.now(UTC))
    """When it happened, in UTC; ISO 8601 in the file."""
    request: str
    """The server's name for the request."""
    principal: str | None = None
    """Whom the request is attributed to."""
    event: EventKind
    detector: str | None = None
    zone: Zone | None = None
    score: Score = None
    """The detector's readout, in logits."""
    threshold: Score = None
    """The breach threshold that the score was compared with, in logits."""
    position: int | None = None
    """Absolute position of the last token that the verdict includes."""
    coverage: Coverage | None = None
    action: Action | None = None
    reason: str | None = None
    patched_from: int | None = None
    """Absolute position of the first token that passed through the model under the patch, once one has."""
    guard: str
    """Digest of the guard that scored the request."""
    text: str | None = None
    """Prompt text; written only if the log was opened with ``include_text``."""


class AuditLog:
    """An append-only JSON-lines file that several threads may write to.

    Every line reaches the operating system before ``write`` returns, and the disk before ``close`` returns.

    Args:
        path: a file on disk, never truncated; made if it is not there, for its owner alone to read and write. One that
            is there keeps its permissions.
        include_text: write prompt text too.

    Raises:
        ConfigError: if the file cannot be opened.
    """

    def __init__(self, path: str | Path, include_text: bool = False) -> None:
        self.include_text = include_text
        self._lock = threading.Lock()
        try:
            cut_short = _ends_within_a_line(Path(path))
            private = partial(os.open, mode=0o600)
            self._file = open(path, "a", encoding="ascii", buffering=1, newline="\n", opener=private)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"cannot open the audit log {path}: {error.strerror}; make its folder or name another file"
            ) from error
        if cut_short:
            self._file.write("\n")

    def write(self, event: AuditEvent) -> None:
        """Append one event.

        Raises:
            OSError: if the line cannot be written. Let it end the request: what is not logged must not run.
            ValueError: if the log is closed.
        """
        record = event.model_dump(mode="json", exclude=None if self.include_text else {"text"})
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        """Force everything to disk and close the file; a second call does nothing.

        Raises:
            OSError: if the disk does not take it.
        """
        with self._lock:
            if self._file.closed:
                return
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _ends_within_a_line(path: Path) -> bool:
    # A process that was killed may leave half a line, which the next event must not be glued to.
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
