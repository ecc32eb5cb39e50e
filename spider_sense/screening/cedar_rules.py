"""The operator's rules in Cedar's own language, checked against what Cedar is told of a call.

A rule for an action, a type or an attribute that does not exist never holds, and Cedar says nothing of it: a typo would
leave a tool unguarded. So a file that does not validate is refused, in the validator's words. A condition that is false
of itself, such as one that asks for two zones at once, is not looked for.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spider_sense.errors import ConfigError, nearest
from spider_sense.screening.cedar import ACTIONS, literal
from spider_sense.screening.signature import KINDS
from spider_sense.types import ZONES

__all__ = ["UNNAMED", "read_rules"]

UNNAMED = "a rule without @id"
"""What evidence calls a rule that has no name of its own."""

_SCHEMA = """
entity Principal;
entity Tool{tools};
action {actions} appliesTo {{
    principal: Principal,
    resource: Tool,
    context: {{ tool: String, principal: String, arguments: Bool, zone: String, signature: String }}
}};
"""
"""Cedar types records by their fields, and arguments are whatever a model wrote. So what tests them is put as a truth
of which nothing is known; a test that cannot be evaluated on a call denies it."""
_CONTEXT = ("arguments", "principal", "signature", "tool", "zone")
_ALLOWED = (
    f"A rule may name the actions {', '.join(ACTIONS.values())}, the types Principal and Tool, which have no "
    f"attributes, and of context {', '.join(_CONTEXT)}"
)
_CONNECTIVES = frozenset({"&&", "||", "!", "if-then-else"})
_TESTS = frozenset({"&&", "||", "!", "==", "!=", "<", "<=", ">", ">=", "in", "is", "has", "like", "contains"})
"""What is true or false, whatever it is about."""
_NO_SUCH_TOOL = "is not declared as a valid eid"
_WORDS = {"zone": ZONES, "signature": ("", *(kind for kind in KINDS if kind != "benign"))}


def read_rules(path: Path, known: Sequence[str] | None) -> str:
    """Read a file of Cedar rules.

    Args:
        path: the file.
        known: names of all tools there are; None if that is not said.

    Returns:
        Its text.

    Raises:
        ConfigError: if it cannot be read, or has a rule that is not valid or for what there never is, named.
    """
    import cedarpy

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path.absolute()}: {error}; name a file of Cedar rules") from error
    try:
        found = json.loads(cedarpy.policies_to_json_str(text))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid Cedar: {error}") from error
    if found["templates"]:
        raise ConfigError(f"{path}: nobody fills in ?principal and ?resource, so such a rule never holds; write it out")
    told = {_name(place, rule): "; ".join(_faults(rule, known)) for place, rule in found["staticPolicies"].items()}
    faults = [f"{path}, {name} does not fit what Cedar is told: {fault}" for name, fault in told.items() if fault]
    if faults:
        raise ConfigError("\n".join([*faults, _ALLOWED]))
    return text


def _name(place: str, rule: Mapping[str, Any]) -> str:
    name = rule.get("annotations", {}).get("id")
    return f"rule {int(place.removeprefix('policy')) + 1}" + (f" ({name})" if name else "")


def _faults(rule: Mapping[str, Any], known: Sequence[str] | None) -> Iterator[str]:
    """Return what a rule asks for and there never is; whether it holds without that nobody says."""
    import cedarpy

    words = _WORDS | ({"tool": known} if known else {})
    no_tools = [] if known is None else list(_unknown_tools(rule, known))
    yield from no_tools
    for body in (condition["body"] for condition in rule["conditions"]):
        yield from _whole_numbers(body)
        yield from _unknown_words(body, words)
        yield from _unknown_attributes(body)
    conditions = [condition | {"body": _masked(condition["body"])} for condition in rule["conditions"]]
    one = {"staticPolicies": {"rule": {**rule, "conditions": conditions}}, "templates": {}, "templateLinks": []}
    tools = f" enum [{', '.join(map(literal, known))}]" if known else ""
    schema = _SCHEMA.format(tools=tools, actions=", ".join(ACTIONS.values()))
    found = cedarpy.validate_policies(cedarpy.policies_from_json_str(json.dumps(one)), schema)
    # The validator says it once for each action, and may name it; of a tool it does not say what is nearest.
    told = (error.error for error in found.errors if not (no_tools and error.error.endswith(_NO_SUCH_TOOL)))
    said = (re.sub("^for policy `policy0`[,:] ", "", fault) for fault in told)
    yield from sorted({re.sub(r" for Action::\"\w+\"", "", fault) for fault in said}, reverse=True)


def _unknown_tools(rule: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    """Return what is wrong with names of tools."""
    named = dict.fromkeys(node["id"] for node in _nodes(rule) if node.get("type") == "Tool" and "id" in node)
    yield from (f"there is no tool {name!r}; {nearest(name, known)}" for name in named if name not in known)


def _whole_numbers(body: dict[str, Any]) -> Iterator[str]:
    """Return what is wrong with whole numbers: nothing that Cedar is told has one."""
    for number in (node["Value"] for node in _nodes(body) if type(node.get("Value")) is int):
        yield f'nothing is ever {number}, because numbers in arguments are decimals; write decimal("{number}.0")'


def _connected(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the truths that a condition is put together from; nothing if it is one test."""
    ((operator, parts),) = body.items()
    if operator in _CONNECTIVES:
        return list(parts.values())
    # Of two tests it may be asked whether they come out the same.
    if operator in ("==", "!=") and any(part.keys() <= _TESTS for part in parts.values()):
        return list(parts.values())
    return []


def _masked(body: dict[str, Any]) -> dict[str, Any]:
    """Return a condition with an unknown truth in place of what tests arguments."""
    if _connected(body):
        ((operator, parts),) = body.items()
        return {operator: {name: _masked(part) for name, part in parts.items()}}
    return _attribute("arguments") if _attribute("arguments") in _nodes(body) else body


def _unknown_words(body: dict[str, Any], words: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Return what is wrong with words that an attribute is compared with and never is."""
    if parts := _connected(body):
        for part in parts:
            yield from _unknown_words(part, words)
        return
    nodes = list(_nodes(body))
    texts = [node["Value"] for node in nodes if isinstance(node.get("Value"), str)]
    for attribute, known in words.items():
        if _attribute(attribute) in nodes:
            yield from (
                f"context.{attribute} is never {text!r}; {nearest(text, known)}" for text in texts if text not in known
            )
            if "like" in body and not any(_like(word, body["like"]["pattern"]) for word in known):
                yield f"context.{attribute} is never like that; it is one of {', '.join(map(literal, known))}"


def _like(word: str, pattern: Sequence[str | Mapping[str, str]]) -> bool:
    parts = (".*" if isinstance(part, str) else re.escape(part["Literal"]) for part in pattern)
    return re.fullmatch("".join(parts), word, re.DOTALL) is not None


def _unknown_attributes(body: dict[str, Any]) -> Iterator[str]:
    """Return what is wrong with ``has``, which the validator lets ask for anything."""
    for asked in (node["has"] for node in _nodes(body) if "has" in node):
        variable = asked["left"].get("Var")
        if variable is not None and not (variable == "context" and asked["attr"] in _CONTEXT):
            yield f"{variable} never has {asked['attr']!r}"


def _attribute(name: str) -> dict[str, Any]:
    return {".": {"left": {"Var": "context"}, "attr": name}}


def _nodes(node: object) -> Iterator[dict[str, Any]]:
    """Return every object within a part of a rule, itself among them."""
    if isinstance(node, dict):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(part)
