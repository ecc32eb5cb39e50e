"""What a served guard is told, by ``--additional-config '{"spider_sense": {...}}'`` or the environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from spider_sense.config import Settings, load_yaml, parse
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.policy import Policy
from spider_sense.serving.principals import UNKNOWN

__all__ = ["ENABLED", "FIELD", "GUARD", "KEY", "PATCHED", "ServingSettings", "find_settings"]

KEY = "spider_sense"
"""Key of the settings in vLLM's additional configuration, and of the verdict in an answer."""
FIELD = "kv_transfer_params"
"""Field of an answer, and of the chunk that ends a choice, whose key ``KEY`` holds the verdict."""
PATCHED = "spider_sense_patched"
"""Attribute of vLLM's steps: the first patched position of each of its requests that is patched."""
GUARD = "SPIDER_SENSE_GUARD"
"""Environment variable that names a guard where the configuration does not."""
ENABLED = "SPIDER_SENSE_ENABLED"
"""Environment variable that switches everything off if it is 0."""

SECRET = ("authorization", "cookie", "proxy-authorization", "x-api-key")
"""Headers whose values are nobody's name."""


class ServingSettings(Settings):
    """How a server is guarded."""

    guard: Path
    """Folder of the guard."""
    policy: Path | None = None
    """YAML file; without one a breach is stopped and a suspect flagged."""
    audit: Path | None = None
    """JSON-lines file that events are appended to; data-parallel ranks after the first add their number to the name."""
    audit_text: bool = False
    """Whether the audit log holds prompts."""
    scores: bool = False
    """Whether answers carry scores and thresholds, which show an attacker how near a prompt came."""
    allow_uncertified: bool = False
    """Whether a dtype, a quantisation or LoRA adapters are accepted that the thresholds were not calibrated for."""
    principal_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] | None = None
    """Header that names who sends a request. It is believed, so it has to be set by a proxy that clients cannot go
    around; without it the API key tells, where the server has any."""
    extraction: Path | None = None
    """YAML file of ``ExtractionSettings``: who mines the model is watched for; None for nobody."""
    exempt_principals: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Those whose requests are scored and recorded, and never acted on."""
    graph: str | None = Field(default=None, repr=False)
    """Set by the plugin: what of the guard is compiled into the model's graph. vLLM hashes it with its configuration,
    so that a graph that was cached under another guard, or none, is not loaded."""

    @model_validator(mode="after")
    def _principals_are_told_apart(self) -> Self:
        if (self.principal_header or "").lower() in SECRET:
            raise ValueError(
                f"principal_header: {self.principal_header} carries a secret, which would be written into the audit "
                "log; name a header of its own, such as X-Principal, or leave it out and let the API key tell"
            )
        if UNKNOWN in self.exempt_principals:
            raise ValueError(
                f"exempt_principals: {UNKNOWN!r} is everybody who does not say who they are; name those who do"
            )
        return self

    def load_extraction(self) -> ExtractionSettings:
        """Read how extraction is watched for, where it is.

        Raises:
            ConfigError: if the file cannot be read or is wrong.
        """
        assert self.extraction is not None
        return load_yaml(self.extraction, ExtractionSettings)

    def load_policy(self) -> Policy:
        """Read the policy in force.

        Raises:
            ConfigError: if its file cannot be read or is wrong.
        """
        return Policy.default() if self.policy is None else load_yaml(self.policy, Policy)


def find_settings(additional_config: Any) -> ServingSettings | None:
    """Return the settings in force, None if nothing is to be guarded.

    Args:
        additional_config: vLLM's, a mapping as far as this knows it.

    Raises:
        ConfigError: if the settings are there and wrong.
    """
    if os.environ.get(ENABLED, "1") == "0":
        return None
    found = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if found is None and os.environ.get(GUARD):
        found = {"guard": os.environ[GUARD]}
    return None if found is None else parse(found, ServingSettings, origin=f"additional_config.{KEY}")
