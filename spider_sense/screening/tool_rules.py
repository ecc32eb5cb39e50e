"""The decision on a tool call by the operator's rules. Nothing is executed: the runtime that executes is told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.screening.cedar import ACTIONS, compile_policy, context_value
from spider_sense.screening.cedar_rules import UNNAMED, read_rules
from spider_sense.screening.tool_policy import ToolPolicy
from spider_sense.types import Zone

__all__ = ["Ruling", "ToolRules"]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the rules ask for; nothing set means that the call may go on."""

    deny: str | None = None
    """Which rule says that the call must not be made."""
    check: str | None = None
    """Which rule says that the judge is to be asked."""
    ask: str | None = None
    """Which rule says that a person is to be asked."""


class ToolRules:
    """A policy, compiled.

    Args:
        policy: rules in YAML's form, and perhaps in Cedar's. What Cedar is told of a call: the principal
            ``Principal::"name"`` (the empty name for nobody in particular), the actions ``Action::"execute"``,
            ``"unchecked"`` and ``"unattended"``, the resource ``Tool::"name"``, and the context with ``tool``,
            ``principal``, ``arguments`` (every number a ``decimal``), ``zone`` and ``signature`` (the kind of attack
            whose signature fired, or the empty string).

    Raises:
        ConfigError: if the rules are not valid, or one of them is for what there never is.
        MissingExtraError: if cedarpy is not installed.
    """

    def __init__(self, policy: ToolPolicy) -> None:
        try:
            import cedarpy
        except ImportError as error:
            raise MissingExtraError("cedarpy", "screen") from error
        self._cedar = cedarpy
        more = read_rules(policy.cedar, policy.known) if policy.cedar else ""
        self.text = f"{compile_policy(policy)}\n{more}"
        try:
            self._policies = cedarpy.PolicySet.from_str(self.text)
        except ValueError as error:
            raise ConfigError(f"the tool policy: not valid Cedar: {error}") from error

    def decide(
        self, principal: str | None, tool: str, arguments: Mapping[str, Any], zone: Zone, signature: str = ""
    ) -> Ruling:
        """Decide on one call.

        Args:
            principal: whose agent calls.
            tool: the tool's name.
            arguments: as parsed from JSON.
            zone: what the probes said.
            signature: kind of the attack whose signature fired.
        """
        try:
            context = {
                "tool": context_value(tool),
                "principal": context_value(principal or ""),
                "arguments": context_value(dict(arguments)),
                "zone": zone,
                "signature": signature,
            }
        except ValueError as error:  # UnicodeEncodeError is one
            fault = "not valid text" if isinstance(error, UnicodeError) else str(error)
            return Ruling(deny=f"the arguments cannot be put to the rules: {fault}")
        # Written out once for the three questions.
        written = json.dumps(context)
        requests = [self._request(context, written, action) for action in ACTIONS.values()]
        results = self._cedar.is_authorized_batch(requests, self._policies, [])
        # Cedar skips a rule that it cannot evaluate.
        if any(result.diagnostics.errors for result in results):
            return Ruling(deny="an argument that a rule reads is missing, or not of the type that it expects")
        found = {level: self._forbidden(result) for level, result in zip(ACTIONS, results, strict=True)}
        return Ruling(deny=found["deny"], check=found["check"], ask=found["ask"])

    @staticmethod
    def _request(context: Mapping[str, Any], written: str, action: str) -> dict[str, Any]:
        return {
            "principal": {"type": "Principal", "id": context["principal"]},
            "action": {"type": "Action", "id": action},
            "resource": {"type": "Tool", "id": context["tool"]},
            "context": written,
        }

    def _forbidden(self, result: Any) -> str | None:
        if result.decision is self._cedar.Decision.Allow:
            return None
        names = result.diagnostics.id_annotations_by_reason
        reasons = {names.get(reason) or UNNAMED for reason in result.diagnostics.reasons}
        return ", ".join(sorted(reasons)) or "the rules cannot be evaluated"
