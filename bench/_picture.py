"""The picture of the comparison: attack success against false positives, every arm a point, and the probes by file."""

from pathlib import Path
from typing import Any

from nest.pictures.canvas import COLOURS, panels, write_png

__all__ = ["draw"]


def draw(compared: dict[str, dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Draw both panels into a PNG.

    Args:
        compared: arms as :func:`_arms.summarise` gives them.
        results: by probe, what it is worth on unseen files.
        path: of the picture.
    """
    left, right = panels(["What passes and what is stopped", "Probes on unseen files"], "", "", (13.0, 5.0))
    for place, (name, arm) in enumerate(compared.items()):
        point = arm["false_positives"], arm["attack_success"]
        x, y = (share["value"] for share in point)
        spans = [[[share["value"] - share["low"]], [share["high"] - share["value"]]] for share in point]
        colour = COLOURS[place % len(COLOURS)]
        left.errorbar(x, y, xerr=spans[0], yerr=spans[1], fmt="o", color=colour, label=name, alpha=0.85, capsize=2)
    left.set(
        xlabel="false positives, share of benign stages",
        ylabel="attack success",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    left.legend(fontsize=8, frameon=False, title="95% intervals", title_fontsize=8)
    rows = [
        (f"{name}: {source.replace('_', ' ')}", item)
        for name, result in results.items()
        for source, item in _shown(result).items()
    ]
    for place, (_, item) in enumerate(reversed(rows)):
        low, high = item["interval"]["low"], item["interval"]["high"]
        right.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
        right.plot(item["guard"]["auroc"], place, "o", color=COLOURS[0], label="probe" if place == 0 else None)
        for key, mark, colour in (("tfidf", "x", COLOURS[1]), ("length", "|", COLOURS[2])):
            right.plot(item[key]["auroc"], place, mark, color=colour, label=key if place == 0 else None)
    right.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
    right.axvline(0.5, color=COLOURS[7], linewidth=1, linestyle=":", zorder=0)
    right.set(xlabel="AUROC, with its 95% interval over groups", xlim=(-0.02, 1.02))
    right.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    write_png(right, path)


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["files"], **result.get("within", {})}
