"""A file of secrets to look for: a JSON line each, ``{"owner", "label", "text", "readers"}``, readers optional."""

from pathlib import Path

from pydantic import Field, ValidationError

from spider_sense.errors import ConfigError
from spider_sense.folders import Record
from spider_sense.screening.leaks import LeakWatch

__all__ = ["protect_all"]


class _Secret(Record):
    owner: str = Field(min_length=1)
    label: str = Field(min_length=1)
    text: str
    readers: frozenset[str] = frozenset()


def protect_all(watch: LeakWatch, path: Path) -> int:
    """Protect every secret of a file, and return how many there were.

    Raises:
        ConfigError: if the file cannot be read, naming the line if it is a line's fault; never quoting a secret.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a file of JSON lines") from error
    secrets = [_secret(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    for secret in secrets:
        watch.protect(secret.owner, secret.label, secret.text, secret.readers)
    return len(secrets)


def _secret(line: bytes, where: str) -> _Secret:
    try:
        return _Secret.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "line"
        # The error itself would quote what it was given.
        raise ConfigError(f"{where}: {field}: {first['msg']}; write owner, label and text") from None
