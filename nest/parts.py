"""Finished parts of a long measurement, kept in its result file: a run that is cut off goes on where it was.

A part is kept with a key, a digest of everything that it depends on; with another key it is measured again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from spider_sense.errors import DataError
from spider_sense.folders import check_writable

__all__ = ["PartStore", "key_of", "read_results"]

SCHEMA = 1


def key_of(*parts: object) -> str:
    """Return a short digest of JSON-ready values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class PartStore:
    """Parts by name, in memory or in a file.

    Args:
        path: the result file; None keeps nothing. Parts that it holds already are used where their keys agree.

    Raises:
        ConfigError: if the file could not be written.
        DataError: if the file exists and is no result file, which would be lost.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._found: dict[str, dict[str, Any]] = {}
        if self.path is not None:
            check_writable(self.path.parent)
        if self.path is not None and self.path.exists():
            document = _read(self.path)
            self._found = {**document.get("kept", {}), **document["rows"]}
        self.parts: dict[str, dict[str, Any]] = {}
        """What was asked for in this run."""
        self.replaced: list[str] = []
        """Parts that the file held under other keys and that were measured again in this run."""

    @property
    def kept(self) -> dict[str, dict[str, Any]]:
        """Parts that the file holds and that were not asked for in this run."""
        return {name: part for name, part in self._found.items() if name not in self.parts}

    def part(self, name: str, key: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return a part's rows: as found, or computed now and written.

        Args:
            name: of the part, its own within the measurement.
            key: see :func:`key_of`.
            compute: measures it; what it returns must be JSON-ready.
        """
        found = self._found.get(name)
        if found is None or found.get("key") != key:
            self.replaced += [name] if found else []
            begin = monotonic()
            rows = dict(compute())
            found = {"key": key, "seconds": round(monotonic() - begin, 4), **rows}
        self.parts[name] = found
        self._found[name] = found
        self._write({"schema": SCHEMA, "complete": False, "rows": self._found})
        return found

    def finish(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write the whole result, figures first, and return it.

        Parts that were not asked for are no part of it; the file keeps them for a run that asks for them again.
        """
        result = {"schema": SCHEMA, "complete": True, **figures, "rows": self.parts, "kept": self.kept}
        self._write(result)
        return result

    def _write(self, document: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text(json.dumps(document) + "\n", encoding="utf-8")
        beside.replace(self.path)


def read_results(paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Read finished results by the stems of their files.

    Raises:
        DataError: if a file is missing, damaged, no result, unfinished, or two have one name.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"{path} does not exist; name a file that `nest eval --out` wrote")
        document = _read(path)
        if not document["complete"]:
            raise DataError(f"{path} is unfinished; run `nest eval` with the same options again, it goes on")
        if path.stem in results:
            raise DataError(f"two results are called {path.stem!r}; rename one, they are listed by that name")
        results[path.stem] = document
    return results


def _read(path: Path) -> Any:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a result: {error}; name another file") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or "complete" not in document:
        raise DataError(f"{path} is no result of `nest eval`, so it is neither read nor replaced; name another file")
    return document
