"""The compiler: there is none."""

from typing import Any

from triton.backends.compiler import BaseBackend

__all__ = ["InterpreterBackend"]


class InterpreterBackend(BaseBackend):  # type: ignore[misc]
    """Refuses to compile."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("this backend only interprets; set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: Any) -> None:
        raise NotImplementedError("this backend only interprets; set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError("this backend only interprets; set TRITON_INTERPRET=1")

    def get_module_map(self) -> dict[str, Any]:
        return {}
