"""The served model as a judge, behind an endpoint in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spider_sense.screening.judge_model import JudgeModel, JudgeSettings

__all__ = ["endpoint", "model_judge"]


@contextmanager
def endpoint(model: str) -> Iterator[str]:
    """Serve a model for the length of a block.

    Yields:
        The address that OpenAI clients take.
    """
    process = subprocess.Popen(  # noqa: S603 - the command is this file's own
        [sys.executable, str(Path(__file__).with_name("_chat_endpoint.py")), model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def model_judge(model: str, name: str) -> Iterator[JudgeModel]:
    """Give a judge that asks a model; an answer has at most 80 tokens and a minute."""
    with endpoint(model) as address:
        settings = JudgeSettings(url=address, model=name, seconds=60, max_tokens=80, structured=False)
        with JudgeModel(settings) as judge:
            yield judge
