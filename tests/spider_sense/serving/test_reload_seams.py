"""A reload of an engine that serves: how long it waits, and which engines are not asked."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.serving.reload_seams import reload_guard


class Busy:
    """As much of an ``AsyncLLM`` as a reload touches, whose requests end after some seconds."""

    def __init__(self, seconds: float, cores: int = 1) -> None:
        self.seconds, self.engine_core = seconds, self
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=cores))
        self.did: list[str] = []

    async def is_paused(self) -> bool:
        return False

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("wait", True)
        await asyncio.sleep(self.seconds)
        self.did.append("paused")

    async def call_utility_async(self, name: str, *_: Any) -> Any:
        self.did.append(name)
        return {"canaries": None}

    async def resume_generation(self) -> None:
        self.did.append("resumed")


def test_nobody_is_kept_waiting_longer_than_the_operator_says() -> None:
    endless = Busy(3600)
    with pytest.raises(SpiderSenseError, match=r"requests still run: they did not end within 0\.01 seconds"):
        asyncio.run(reload_guard(endless, Path("new"), wait_seconds=0.01))
    assert endless.did == ["resumed"]
    short = Busy(0.01)
    asyncio.run(reload_guard(short, Path("new"), wait_seconds=60))
    assert short.did == ["paused", "spider_sense_reload", "resumed"]


def test_several_engines_are_not_asked_of_which_one_alone_would_answer() -> None:
    several = Busy(0.01, cores=2)
    with pytest.raises(ConfigError, match="in several data-parallel engines at once"):
        asyncio.run(reload_guard(several, Path("new")))
    assert several.did == []
