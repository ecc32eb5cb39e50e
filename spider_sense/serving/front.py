"""What a process that answers clients keeps of the guard in force: what it counts and says, whom it slows or hushes."""

from collections.abc import Mapping
from typing import Any, cast

from spider_sense import policy
from spider_sense.guard import Guard
from spider_sense.serving.findings import Note
from spider_sense.serving.prometheus import GuardMetrics
from spider_sense.serving.reasoning import Hush
from spider_sense.serving.throttle import Throttle

__all__ = ["Front"]


class Front:
    """Takes what the engine tells.

    Args:
        guard: in force.
        rules: the policy in force.
        version: of this package.
    """

    def __init__(self, guard: Guard, rules: policy.Policy, version: str) -> None:
        self._metrics = GuardMetrics(guard, rules, version)
        self.throttle = Throttle(rules.throttle) if "throttle" in rules.actions else None
        """Stays for good: an engine refuses a guard that throttles where that of before did not."""
        section = rules.extraction if "omit_reasoning" in rules.actions else None
        self.hush = None if section is None else Hush(section.reasoning_seconds)
        """Stays as well, for the same reason."""
        self.said: Mapping[str, Any] = {}
        """What ``GET /v1/guard`` says."""

    def take(self, told: Mapping[str, Any]) -> None:
        """Take a letter: the ``Note`` of a step, or what is in force from now on."""
        if "in_force" in told:
            self._follow(told["in_force"])
            return
        note = cast(Note, told)
        self._metrics.count(note)
        if self.throttle is not None:
            self.throttle.slow(note["throttled"])
        if self.hush is not None:
            self.hush.add(note.get("hushed", ()))

    def _follow(self, said: Mapping[str, Any]) -> None:
        rules = said["policy"]
        self.said = said
        self._metrics.follow(said["guard"]["digest"], rules["digest"], rules["actions"])
        if self.throttle is not None:
            self.throttle.follow(policy.Throttle(**rules["throttle"]) if "throttle" in rules["actions"] else None)
        if self.hush is not None:
            hushes = "omit_reasoning" in rules["actions"]
            self.hush.follow(rules["extraction"]["reasoning_seconds"] if hushes else None)
