"""A function around another: called with the original, once however often it is put there."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from spider_sense.serving.wrap import wrap


class Engine:
    def __init__(self, name: str) -> None:
        self.name = name

    def say(self, text: str, end: str = ".") -> str:
        return f"{self.name}: {text}{end}"


class Loud(Engine):
    """Inherits what is taken hold of."""


def test_a_method_is_called_through_what_is_put_around_it_once() -> None:
    def around(original: Callable[..., str], engine: Engine, text: str, **options: Any) -> str:
        return f"<{original(f'{text} of {engine.name}', **options)}>"

    for owner in (Engine, Engine, Loud):
        wrap(owner, "say", around)
    assert [kind("e").say("verdict", end="!") for kind in (Engine, Loud)] == ["<e: verdict of e!>"] * 2
    assert Engine.say.__name__ == "say"


def test_a_function_of_a_module_has_no_instance() -> None:
    module = SimpleNamespace(add=lambda first, second: first + second)
    wrap(module, "add", lambda original, first, second: 10 * original(first, second))
    assert module.add(1, second=2) == 30
