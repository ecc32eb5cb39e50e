"""What an operator says of tools, read from YAML::

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

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from spider_sense.config import Settings
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

    @model_validator(mode="after")
    def _allow_has_no_conditions(self) -> Self:
        if self.then == "allow" and self.model_fields_set - {"tool", "then"}:
            raise ValueError(
                "allow takes no conditions, because rules only forbid; write what is not allowed, with then: deny"
            )
        return self


class ToolPolicy(Settings):
    """All of it."""

    rules: tuple[ToolRule, ...] = ()
    default: Level = "check"
    cedar: Path | None = None
