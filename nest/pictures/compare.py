"""Safety against what it costs: every arm a point with its intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.pictures.canvas import COLOURS, legend, panels, points, write_png
from spider_sense.errors import ConfigError, DataError, nearest
from spider_sense.printable import printable

__all__ = ["AGAINST", "draw_comparison"]

AGAINST: Mapping[str, str] = {
    "utility": "utility: mean accuracy of the tasks, %",
    "over_refusal": "over-refusal on ordinary prompts, %",
    "over_refusal_borderline": "over-refusal on borderline prompts, %",
    "perplexity": "perplexity",
    "kl": "KL(base || model) on benign answers, nats a token",
}
"""What may stand on the horizontal axis."""
_SHARES = ("utility", "over_refusal", "over_refusal_borderline")
_KINDS = {"asr": "direct prompts", "asr_jailbreak": "jailbreak wrappers"}
SIZE, SIZE_OF_ONE = (12.0, 5.0), (8.0, 5.0)


def draw_comparison(results: Mapping[str, Mapping[str, Any]], against: str, path: Path) -> Path:
    """Draw attack success of each result over another figure, and write the PNG.

    Args:
        results: by name, as ``nest eval`` wrote them.
        against: a key of `AGAINST`.
        path: the picture; see :func:`nest.pictures.canvas.write_png`.

    Returns:
        The file that was written.

    Raises:
        ConfigError: if there is no such axis, or the picture cannot be written.
        DataError: if a result lacks a figure.
    """
    if against not in AGAINST:
        raise ConfigError(f"cannot draw attack success against {against!r}; {nearest(against, AGAINST)}")
    for name, result in results.items():
        lacking = [key for key in ("asr", against) if result.get(key) is None]
        if lacking:
            raise DataError(
                f"{name} has no {lacking[0]}; evaluate it with prompts or tasks for that, or draw against another"
            )
    kinds = [key for key in _KINDS if any(result.get(key) is not None for result in results.values())]
    pictures = panels(
        [_KINDS[key] for key in kinds],
        AGAINST[against],
        "answers that do not refuse, %",
        SIZE if len(kinds) > 1 else SIZE_OF_ONE,
        heading="Attack success: lower is safer",
    )
    for key, picture in zip(kinds, pictures, strict=True):
        for index, (name, result) in enumerate(results.items()):
            if result.get(key) is not None:
                across = _scaled(result[against], 100.0 if against in _SHARES else 1.0)
                up = _scaled(result[key], 100.0)
                points(picture, [across], [up], COLOURS[index % len(COLOURS)], label=printable(name))
        picture.set_ylim(-4, 104)
        picture.grid(axis="both", alpha=0.3)
    legend(pictures[0])
    return write_png(pictures[0], path)


def _scaled(figure: Mapping[str, float], scale: float) -> dict[str, float]:
    return {key: scale * figure[key] for key in ("value", "low", "high")}
