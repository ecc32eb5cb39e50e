"""From the results of single runs to one row an arm: the mean over its runs, with intervals over prompts.

A prompt's outcome is averaged over the runs of an arm before prompts are resampled, so an interval speaks of the
arm's mean and not of one run. Differences between arms are taken prompt by prompt, over the same resamples.
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from statistics import mean as average
from statistics import stdev
from typing import Any

from nest.figures import differences, figures_of

__all__ = ["FIGURES", "summarise", "summarise_all"]

FIGURES = (
    "asr",
    "asr_jailbreak",
    "over_refusal",
    "over_refusal_borderline",
    "over_refusal_wrapped",
    "utility",
    "perplexity",
    "kl",
)
"""Every summary has them; what was not measured is None."""
_JUDGED_TWICE = FIGURES[:5]
_ONCE = ("trained_parameters", "trained_share", "patch_bytes", "train_seconds", "learning_rate")
_RESAMPLES = 2000
Result = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Any]]


def summarise_all(results: Mapping[str, Result], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return a summary for each arm; names of runs begin with their arm and ``-seed``.

    Beside its own figures an arm has ``versus_base`` and, unless it is that arm, ``versus_nest``: what it has more of
    each figure, perplexity as a relative change, with paired intervals.
    """
    arms: dict[str, list[Result]] = {}
    for name, result in results.items():
        arms.setdefault(name.partition("-seed")[0], []).append(result)
    rows = {arm: mean_rows([run["rows"] for run in runs]) for arm, runs in arms.items()}
    return {
        arm: summarise(runs, seed)
        | {
            f"versus_{other}": differences(rows[arm], rows[other], seed, _RESAMPLES)
            for other in ("base", "nest")
            if other in rows and arm not in ("base", other)
        }
        for arm, runs in arms.items()
    }


def summarise(runs: Sequence[Result], seed: int = 0) -> dict[str, Any]:
    """Summarise the runs of one arm.

    Args:
        runs: results on the same prompts.
        seed: of the bootstrap.

    Returns:
        JSON-ready: each figure as a number, ``intervals`` [low, high] of 95%, ``sd`` over the runs, ``runs``,
        ``attacks``, ``seconds`` of training and measuring a run.
    """
    figures = figures_of(mean_rows([run["rows"] for run in runs]), seed, _RESAMPLES)
    names = (*FIGURES, *(f"{name}_classifier" for name in _JUDGED_TWICE))
    known = {name: figures[name] for name in names if figures[name] is not None}
    return {
        **dict.fromkeys(FIGURES),
        **{name: figure["value"] for name, figure in known.items()},
        **{name: average(run[name] for run in runs) for name in _ONCE if all(name in run for run in runs)},
        "runs": len(runs),
        "seconds": average(run["seconds"] + run.get("train_seconds", 0.0) for run in runs),
        "attacks": {name: attack["asr"] for name, attack in figures["attacks"].items()},
        "intervals": {name: [figure["low"], figure["high"]] for name, figure in known.items()},
        "sd": {name: _spread([run[name]["value"] for run in runs]) for name in known},
    }


def mean_rows(runs: Sequence[Rows]) -> dict[str, dict[str, Any]]:
    """Return rows whose outcomes are means over runs: parts that all runs have, on the same prompts."""
    first = runs[0]
    shared = [part for part in first if all(part in run for run in runs)]
    return {part: {name: _mean([run[part][name] for run in runs]) for name in first[part]} for part in shared}


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, of lists of numbers place by place, and of anything else the first."""
    if all(isinstance(value, Real) for value in values):
        return values[0] if isinstance(values[0], bool) else average(values)
    if all(isinstance(value, list) and value and isinstance(value[0], Real) for value in values):
        return [average(map(float, column)) for column in zip(*values, strict=True)]
    return values[0]


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
