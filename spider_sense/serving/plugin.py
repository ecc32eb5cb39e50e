"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""

import os

from spider_sense.serving.settings import ENABLED

__all__ = ["register"]


def register() -> None:
    """Take hold of vLLM. Nothing of it changes what an engine does unless its configuration names a guard."""
    if os.environ.get(ENABLED, "1") == "0":
        return
    from spider_sense.serving.seams import install

    install()
