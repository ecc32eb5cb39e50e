"""Triton, or a stand-in where there is none: kernels can be defined there, and say what is missing when launched."""

from typing import Any

__all__ = ["AVAILABLE", "INTERPRETED", "tl", "triton"]


class _Absent:
    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self

    def __getitem__(self, grid: Any) -> "_Absent":
        raise ModuleNotFoundError("this kernel needs Triton, which is not installed here: pip install triton (Linux)")


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = _Absent()

AVAILABLE: bool = not isinstance(triton, _Absent)
"""Whether Triton is installed."""

INTERPRETED: bool = AVAILABLE and triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when it was imported)."""
