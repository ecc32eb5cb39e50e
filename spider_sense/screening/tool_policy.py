"""What an operator says of tools, read from YAML::

    known: [search, send_money, send_mail, shell]  # all tools there are; a rule for none of them is an error
    default: check            # a tool that no rule allows; allowing * allows none
    rules:
      - {tool: search, then: allow}
      - {tool: send_money, then: allow}
      - {tool: send_money, when: {amount: {above: 1000}}, then: ask}
      - {tool: send_mail, unless: {to: {like: "*@example.org"}}, then: deny}
      - {tool: "shell*", then: check}
      - {tool: "*", zones: [suspect], principal: "guest-*", then: deny}
    cedar: more.cedar         # rules in Cedar's own language, relative to the working directory

``allow`` names a tool that the default is not for; no other rule lifts the default. ``check``: the judge is asked
whatever the probes say. ``ask``: it takes a person's word. ``deny``: never. Every rule that matches counts, and they
add up. A rule with ``when`` holds where all of its conditions hold, one with ``unless`` where not all of them do. A
condition on an argument of another type than it expects is no miss: the call is denied.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from spider_sense.config import Settings
from spider_sense.errors import nearest
from spider_sense.types import Zone

__all__ = ["Condition", "Level", "ToolPolicy", "ToolRule"]

Level = Literal["allow", "check", "ask", "deny"]


class Condition(Settings):
    """A test of one argument; exactly one field is set."""

    equals: str | bool | FiniteFloat | None = None
    one_of: tuple[str, ...] | None = Field(None, min_length=1)
    """Strings."""
    like: str | None = None
    """A string in which ``*`` stands for any text; letters count as they are written."""
    above: FiniteFloat | None = None
    """A number above it."""
    below: FiniteFloat | None = None
    """A number below it."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in self.model_dump().values()) != 1:
            raise ValueError(f"a condition is one of {', '.join(type(self).model_fields)}")
        return self


class ToolRule(Settings):
    """One line of the policy."""

    tool: str = Field(min_length=1)
    """Its name; ``*`` stands for any text."""
    principal: str = Field("*", min_length=1)
    """Whose agent calls; ``*`` stands for any text, and for nobody in particular."""
    zones: tuple[Zone, ...] = ()
    """What the probes must have said; empty: whatever they said."""
    when: dict[str, Condition] = Field(default_factory=dict)
    """By argument; ``a.b`` is the key ``b`` of the argument ``a``."""
    unless: dict[str, Condition] = Field(default_factory=dict)
    then: Level

    def names(self, tool: str) -> bool:
        """Return whether the rule is for a tool."""
        return re.fullmatch(".*".join(map(re.escape, self.tool.split("*"))), tool, re.DOTALL) is not None

    @model_validator(mode="after")
    def _allow_has_no_conditions(self) -> Self:
        if self.then == "allow" and self.model_fields_set - {"tool", "then"}:
            raise ValueError(
                "allow takes no conditions, because rules only forbid; write what is not allowed, with then: deny"
            )
        return self


class ToolPolicy(Settings):
    """All of it."""

    known: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of all tools there are."""
    rules: tuple[ToolRule, ...] = ()
    default: Level = "check"
    cedar: Path | None = None

    @model_validator(mode="after")
    def _rules_are_for_known_tools(self) -> Self:
        for number, rule in self.idle(self.known) if self.known else ():
            raise ValueError(
                f"rule {number} is for {rule.tool!r}, which is no known tool, so it never holds; "
                f"{nearest(rule.tool, self.known or ())}"
            )
        return self

    def idle(self, tools: Collection[str]) -> list[tuple[int, ToolRule]]:
        """Return the rules, with their numbers, that are for none of some tools; a mistyped one is among them."""
        return [(number, rule) for number, rule in enumerate(self.rules, start=1) if not any(map(rule.names, tools))]
