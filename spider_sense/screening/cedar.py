"""Tool policies as Cedar: compiled, evaluated, and closed where Cedar is open.

A call is asked about three times, as the actions ``execute``, ``unchecked`` (may the judge be spared?) and
``unattended`` (may a person be spared?). Everything is permitted, and rules forbid. A rule that fails to evaluate is
skipped by Cedar, so an argument of the wrong type would switch off the rule that was to guard it; here any such
failure denies the call.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.screening.tool_policy import Condition, Level, ToolPolicy, ToolRule

__all__ = ["ACTIONS", "compile_policy", "context_value", "literal"]

ACTIONS: Mapping[Level, str] = {"deny": "execute", "check": "unchecked", "ask": "unattended"}
"""The action that a rule of each level forbids."""

_DEPTH = 32
_LIMIT = Decimal("922337203685477.5807")
_PLAIN = re.compile(r"[A-Za-z0-9 _./@:-]")
_STAR = r"\*"
_RESERVED = frozenset({"__entity", "__extn", "__expr"})


def compile_policy(policy: ToolPolicy) -> str:
    """Return the rules of a policy that stand in YAML in Cedar's language."""
    lines = ['@id("everything")\npermit(principal, action, resource);']
    lines += [_rule(number, rule) for number, rule in enumerate(policy.rules, start=1) if rule.then != "allow"]
    if policy.default != "allow":
        tools = dict.fromkeys(rule.tool for rule in policy.rules if rule.then == "allow" and rule.tool != "*")
        named = " || ".join(f"context.tool like {pattern(tool)}" for tool in tools)
        lines.append(_forbid("default", policy.default, f" unless {{ {named} }}" if named else ""))
    return "\n\n".join(lines) + "\n"


def _rule(number: int, rule: ToolRule) -> str:
    tests = [f"context.tool like {pattern(rule.tool)}"]
    if rule.principal != "*":
        tests.append(f"context.principal like {pattern(rule.principal)}")
    if rule.zones:
        tests.append("[" + ", ".join(map(literal, rule.zones)) + "].contains(context.zone)")
    tests += [_condition(path, condition) for path, condition in rule.when.items()]
    if rule.unless:
        held = " && ".join(_condition(path, condition) for path, condition in rule.unless.items())
        tests.append(f"!({held})")
    return _forbid(f"rule {number} ({rule.tool})", rule.then, f" when {{ {' && '.join(tests)} }}")


def _forbid(name: str, level: Level, clause: str) -> str:
    action = f"Action::{literal(ACTIONS[level])}"
    return f"@id({literal(name)})\nforbid(principal, action == {action}, resource){clause};"


def _condition(path: str, condition: Condition) -> str:
    place, tests = "context.arguments", []
    for key in path.split("."):
        tests.append(f"{place} has {literal(key)}")
        place = f"{place}[{literal(key)}]"
    return f"({' && '.join(tests)} && {_test(place, condition)})"


def _test(place: str, condition: Condition) -> str:
    """Return a test that is an error, and no miss, if the argument is of another type."""
    match condition:
        case Condition(above=float(bound)):
            return f"{place}.greaterThan({_decimal(bound)})"
        case Condition(below=float(bound)):
            return f"{place}.lessThan({_decimal(bound)})"
        case Condition(like=str(glob)):
            return f"{place} like {pattern(glob)}"
        case Condition(one_of=tuple(words)):
            return "(" + " || ".join(_is(place, word) for word in words) + ")"
        case Condition(equals=bool(truth)):
            return f"(if {place} then {str(truth).lower()} else {str(not truth).lower()})"
        case Condition(equals=str(word)):
            return _is(place, word)
    assert isinstance(condition.equals, float)
    value = _decimal(condition.equals)
    return f"({place}.lessThanOrEqual({value}) && {place}.greaterThanOrEqual({value}))"


def _decimal(number: float) -> str:
    text = _fixed(number)
    if text is None:
        raise ConfigError(f"a bound of {number} cannot be kept: four decimals, and at most {_LIMIT}; choose another")
    return f'decimal("{text}")'


def _fixed(number: float) -> str | None:
    exact = Decimal(repr(number))
    return f"{exact:.4f}" if abs(exact) <= _LIMIT and exact == round(exact, 4) else None


def literal(text: str) -> str:
    """Return a string literal of Cedar."""
    return f'"{"".join(part if _PLAIN.fullmatch(part) else _escaped(part) for part in text)}"'


def pattern(text: str, star: str = "*") -> str:
    """Return a pattern for Cedar's ``like``; ``*`` stands for any text, or for itself if ``star`` is ``\\*``."""
    return f'"{"".join(star if part == "*" else literal(part)[1:-1] for part in text)}"'


def _escaped(character: str) -> str:
    return rf"\u{{{ord(character):x}}}"


def _is(place: str, word: str) -> str:
    # == is false, and no error, for a value that is no string.
    return f"{place} like {pattern(word, star=_STAR)}"


def context_value(value: Any, depth: int = 0) -> Any:
    """Return a JSON value as Cedar reads it: numbers as decimals, null as an empty record, a list as a set.

    A number that is no decimal becomes a string, so that a rule that compares it fails, and with it the call.

    Raises:
        ValueError: if the value is nested too deeply, is not text that can be encoded, or holds a key with a meaning
            of its own in Cedar's JSON, by which a caller could write ``decimal("0.0")`` for what it sends as a record.
    """
    if depth > _DEPTH:
        raise ValueError(f"nested more than {_DEPTH} deep")
    match value:
        case bool():
            return value
        case int() | float():
            text = _fixed(value)
            return repr(value) if text is None else {"__extn": {"fn": "decimal", "arg": text}}
        case str():
            value.encode()
            return value
        case None:
            return {}
        case list():
            return [context_value(item, depth + 1) for item in value]
    if _RESERVED & value.keys():
        raise ValueError(f"a key is one of {', '.join(sorted(_RESERVED))}")
    return {context_value(key): context_value(item, depth + 1) for key, item in value.items()}
