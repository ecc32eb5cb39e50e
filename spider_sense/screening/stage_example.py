"""One conversation to train or test a probe of a stage on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spider_sense.chat import Turn
from spider_sense.data import Example
from spider_sense.labels import INJECTION
from spider_sense.screening.stage import Stage

__all__ = ["Row", "StageExample", "built", "observed", "written_call"]

Row = Mapping[str, Any]
"""A line of a prompt set."""


@dataclass(frozen=True, slots=True)
class StageExample:
    """One conversation and the stage in question."""

    example: Example
    """Its ``turns`` end with the stage in question; ``text`` is that span's, for the text controls."""
    stage: Stage
    attack: str
    """Kind of attack, which a split keeps on one side; empty of harmless ones."""

    @property
    def positive(self) -> bool:
        """Whether the stage is an attack."""
        return self.example.label in INJECTION.positive


def written_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as SmolLM2 writes it."""
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>"


def observed(task: str, tool: str, text: str) -> list[Turn]:
    """Return the turns that end with a text that a tool returns."""
    return [("user", task), ("assistant", written_call(tool, {})), ("tool", text)]


def built(
    stage: Stage, source: str, name: str, label: str, turns: list[Turn], attack: str, group: str | None = None
) -> StageExample:
    """Return an example.

    Args:
        stage: the one in question.
        source: the prompt set.
        name: of the row.
        label: of the row.
        turns: of the conversation; the last one is of the stage.
        attack: its kind, if it is one.
        group: what a split keeps together; by default the row is alone.
    """
    example = Example(
        id=f"{source}/{name}",
        text=turns[-1][1],
        label=label,
        category=stage,
        source=source,
        group=group or f"{source}:{name}",
        turns=tuple(turns),
    )
    return StageExample(example, stage, attack if label == "injection" else "")
