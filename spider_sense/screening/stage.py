"""The stages of an agent's loop."""

from typing import Literal, get_args

__all__ = ["STAGES", "Stage"]

Stage = Literal["query", "plan", "action", "observation"]
"""query: what the user asks. plan: what the model writes to think or to answer. action: a tool call that it writes.
observation: what it reads and nobody vouches for, such as a tool's result, a retrieved text, another agent's
message."""

STAGES: tuple[Stage, ...] = get_args(Stage)
