"""The settings of screening, read from YAML; see ``configs/screen.yaml``."""

from pathlib import Path

from pydantic import Field

from spider_sense.config import Settings
from spider_sense.screening.cascade import StagesSettings
from spider_sense.screening.envelope import LIFETIME
from spider_sense.screening.judge_model import JudgeSettings
from spider_sense.screening.tool_policy import ToolPolicy

__all__ = ["ScreenSettings"]


class ScreenSettings(Settings):
    """All of them."""

    stages: StagesSettings = Field(default_factory=StagesSettings)
    judge: JudgeSettings | None = None
    tools: ToolPolicy | None = None
    key_env: str | None = None
    """Environment variable with the operator's key, for envelopes and leaks."""
    envelope_seconds: float = Field(default=LIFETIME, gt=0)
    """For which an envelope is believed; ``.inf`` to replay recorded conversations."""
    secrets: Path | None = None
    """File of secrets to look for; see :mod:`spider_sense.screening.secret_file`."""
    relayed: bool = False
    """Whether all that the agent is asked comes from other agents, in envelopes."""
