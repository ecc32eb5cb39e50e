"""Settings: frozen, typed configuration that is read from YAML and refuses what it does not know.

YAML is read with two changes to PyYAML's rules: a key written twice is an error (PyYAML keeps the last one in silence),
and ``1e-3`` is a number (PyYAML wants ``1.0e-3``).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_json

from spider_sense.errors import ConfigError, nearest

__all__ = ["Settings", "load_yaml", "parse"]

SHOWN = 80
"""Characters of a bad value that an error message repeats."""


class Settings(BaseModel):
    """Base of every configuration record: frozen, no unknown keys, no silent conversions.

    Types are strict: ``"4"`` is not a number and ``1`` is not a boolean. A list in YAML fills a tuple or a set, a
    string fills a path. A validator raises ``ValueError``; ``parse`` turns it into a ConfigError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_yaml(path: str | Path, model_class: type[SettingsT]) -> SettingsT:
    """Read a YAML file into an instance of ``model_class``.

    Raises:
        ConfigError: if the file cannot be read, is not YAML (with the line) or does not fit the class.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name an existing YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2026-13-01
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    return parse(content, model_class, origin=str(path))


def parse(mapping: Mapping[str, object], model_class: type[SettingsT], origin: str) -> SettingsT:
    """Check a mapping as it comes out of YAML and return an instance of ``model_class``.

    Args:
        mapping: keys and values, nested as in the file.
        model_class: what to fill.
        origin: where the mapping comes from; every message starts with it.

    Raises:
        ConfigError: one line a fault, each with the dotted path, the bad value and what is allowed.
    """
    if not isinstance(mapping, Mapping):
        known = ", ".join(model_class.model_fields)
        raise ConfigError(f"{origin}: holds {_clip(mapping)}, not keys and values; known keys: {known}")
    try:
        # By way of JSON, because pydantic's strict mode takes a list for a tuple and a string for a path only there.
        return model_class.model_validate_json(to_json(mapping, inf_nan_mode="constants"))
    except ValidationError as error:
        faults = [f"{origin}: {_explain(fault, model_class)}" for fault in error.errors()]
        raise ConfigError("\n".join(faults)) from error
    except ValueError as error:
        raise ConfigError(f"{origin}: cannot be read as plain keys and values: {error}") from error


def _explain(fault: ErrorDetails, model_class: type[BaseModel]) -> str:
    *parents, key = fault["loc"] or ("",)
    path = ".".join(str(part) for part in fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            return f"unknown key {path!r}; {nearest(str(key), _known_keys(model_class, parents))}"
        case "missing":
            return f"the key {path!r} is missing; add it"
        case "value_error":
            reason = str(fault["ctx"]["error"])
            return f"{path}: {reason}" if path else reason
    allowed = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{path}: {_clip(fault['input'])} is not allowed; {allowed}"


def _known_keys(model_class: type[BaseModel], path: Iterable[int | str]) -> set[str]:
    models = [model_class]
    for part in path:
        annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        # A list index, or the name of a union's member, is no field: it stays with the same models.
        models = [inner for annotation in annotations for inner in _models_in(annotation)] or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _clip(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is written twice; keep one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
