"""A function is put around one of vLLM's, once in a process."""

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["wrap"]

_DONE = "_spider_sense_seam"


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put a function around a method of a class, or around a function of a module; a second call does nothing.

    Args:
        owner: the class or the module.
        name: of what is called from now on through ``around``.
        around: takes the original, bound to its instance where it is a method, and then the arguments of a call.
    """
    original = getattr(owner, name)
    if hasattr(original, _DONE):
        return

    bound = int(isinstance(owner, type))

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, *args[:bound]), *args, **kwargs)

    setattr(run, _DONE, True)
    setattr(owner, name, run)
