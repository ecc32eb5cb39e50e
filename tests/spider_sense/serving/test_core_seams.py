"""An engine core does not start where its guard could do nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError
from spider_sense.models import LoadedModel
from spider_sense.serving.core_seams import made


class Own:
    """A scheduler in which no actor was put."""


def test_an_engine_in_whose_scheduler_nothing_acts_does_not_start(
    tiny_loaded: LoadedModel, guards: Any, tmp_path: Path
) -> None:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    told = {"spider_sense": {"guard": str(tmp_path / "guard")}}
    core = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=told), scheduler=Own())
    with pytest.raises(ConfigError, match="nothing of a guard acts in the scheduler Own"):
        made(lambda: None, core)
