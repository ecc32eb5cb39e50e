"""From outcomes to one table and one JSON object.

An infinite number of requests is null in JSON: half of the attackers or more were not found.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from spider_sense.extraction.bench.config import BenchConfig
from spider_sense.extraction.bench.measure import median_queries
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.extraction.bench.run import Results
from spider_sense.intervals import grouped_interval, rate_interval

__all__ = ["Report", "summarise", "worst_family"]

OURS = "spider-sense"
FOUND = 0.5
"""Share of a campaign's attackers below which it is listed as missed."""
CURVE = (0.01, 0.05, 0.1)
"""Shares of innocent groups that the curve of the group score is read at."""
LEAST_OF_FAMILY = 5
"""Principals of a family that may be named the worst."""

Report = dict[str, Any]
Test = Callable[[Outcome], bool]


def summarise(results: Results, config: BenchConfig) -> Report:
    """Return the figures of every system on every scene, ours in detail, and the keys of the last line."""
    outcomes, main = results.outcomes, config.embeddings[0]
    ours = [one for one in outcomes if one.system == OURS and one.embedding == main]
    lifetime = [one for one in ours if one.scene == "unseen families"]
    rate, interval = _rate(lifetime, config)
    pivot, half = (_cell(config, "pivot", share) for share in (1.0, 0.5))
    template = [one for one in ours if one.scene == _cell(config, "first", 1.0) and one.template]
    size = config.ring_sizes[0]
    ring = _of(ours, f"ring of {size}")
    load = results.figures.get("load", {})
    return {
        "seeds": len({one.seed for one in ours}),
        "lifetime_fpr": rate,
        "lifetime_fpr_low": interval[0],
        "lifetime_fpr_high": interval[1],
        "lifetime_limited": _rate_json(lifetime, config, limited=True),
        "lifetime_fpr_by_stratum": {name: _rate_json(rows, config) for name, rows in _by(lifetime, "stratum")},
        "lifetime_fpr_seen_families": _rate_json(_of(ours, "seen families"), config),
        "worst_family": worst_family(lifetime),
        "control_alarm_rate": _found_share(_of(ours, "no attack")),
        "other_work_alarm_rate": _found_share(_of(ours, "other work")),
        "other_work_limited": _rate_json(_of(ours, "other work"), config, limited=True),
        "pivot_median_queries": _finite(median_queries([one.queries for one in _of(ours, pivot)])),
        "pivot_half_median_queries": _finite(median_queries([one.queries for one in _of(ours, half)])),
        "campaign_median_queries": _finite(median_queries([one.queries for one in template])),
        "group_tpr": float(np.mean([one.alarmed for one in ring])) if ring else None,
        "group_tpr_products": _rate_json(_of(ours, f"ring of {size}, products"), config),
        "group_fpr": _rate_json(_of(ours, "organisations"), config),
        "group_fpr_one_subject": _rate_json(_of(ours, "one subject"), config),
        "group_fpr_shared_subject": _rate_json(_of(ours, f"innocent subject of {size}"), config),
        "group_fpr_shared_subject_products": _rate_json(_of(ours, f"innocent subject of {size}, products"), config),
        "group_curve": _group_curve(ours, config),
        "missed": {
            cell.name: sorted(name for name, rows in _by(_of(ours, cell.name), "family") if _found_share(rows) < FOUND)
            for cell in config.cells
        },
        "bytes_per_principal": load.get("bytes_per_principal"),
        "updates_per_second": load.get("updates_per_second"),
        "systems": _systems(outcomes, config),
        "baselines": _baselines(outcomes, config),
        **results.figures,
    }


def _group_curve(ours: Sequence[Outcome], config: BenchConfig) -> dict[str, Any]:
    """Return, by cover of a ring, the share found where so many of the innocent groups of its kind are alarmed.

    Those of the tests, so that it tells what the score can do, whatever calibration made of it; half of the innocent
    groups have one subject.
    """
    size = config.ring_sizes[0]
    honest = [one for one in ours if one.scene in ("organisations", "one subject")]
    found = {}
    for kind, scene in (("chat", f"ring of {size}"), ("app", f"ring of {size}, products")):
        scores = [one.score for one in honest if one.stratum == kind and one.score is not None]
        rings = _of(ours, scene)
        if scores and rings:
            found[kind] = {
                "at threshold": _found_share(rings),
                "innocent groups": len(scores),
                **{
                    f"{share:g}": _above(rings, float(np.quantile(scores, 1 - share, method="higher")))
                    for share in CURVE
                },
            }
    return found


def _above(rows: Sequence[Outcome], threshold: float) -> dict[str, float]:
    """Return the share of rings above a threshold: of all, and of those with a template and without."""
    flags = [one.score is not None and one.score > threshold for one in rows]
    parts = {"all": flags}
    for name, wanted in (("template", True), ("none", False)):
        parts[name] = [flag for flag, one in zip(flags, rows, strict=True) if one.template == wanted]
    return {name: float(np.mean(part)) for name, part in parts.items() if part}


def worst_family(rows: Sequence[Outcome]) -> dict[str, Any] | None:
    """Return the family with the highest rate of alarms, among those that have five principals or more."""
    rates = [
        {"family": name, "rate": float(np.mean([one.alarmed for one in group])), "principals": len(group)}
        for name, group in _by(rows, "family")
        if len(group) >= LEAST_OF_FAMILY
    ]
    return max(rates, key=lambda row: (row["rate"], row["principals"]), default=None)


def _systems(outcomes: Sequence[Outcome], config: BenchConfig) -> list[dict[str, Any]]:
    """Return one row a system, embedding and scene."""
    rows = []
    for (system, embedding, scene), found in _groups(outcomes, lambda one: (one.system, one.embedding, one.scene)):
        attack = any(one.family in _campaigns(outcomes) for one in found)
        row: dict[str, Any] = {"system": system, "embedding": embedding, "scene": scene, "streams": len(found)}
        if attack and not scene.startswith("ring"):
            queries = [one.queries for one in found]
            interval = grouped_interval(queries, [one.family for one in found], median_queries, config.resamples)
            row |= {
                "median_queries": _finite(median_queries(queries)),
                "median_low": _finite(interval.low),
                "median_high": _finite(interval.high),
                "p90_queries": _finite(float(np.quantile(queries, 0.9, method="higher"))),
                "found": _found_share(found),
                "limited": float(np.mean([one.queries_to_limit < np.inf for one in found])),
                "median_to_limit": _finite(median_queries([one.queries_to_limit for one in found])),
                "found_by_64": float(np.mean([one.queries <= 64 for one in found])),
                "alarmed_before": float(np.mean([one.alarmed and one.queries == np.inf for one in found])),
                "by_tier": {tier: len(rows) / len(found) for tier, rows in _by(found, "tier") if tier},
            }
        else:
            row |= _rate_json(found, config) | {"limited": _rate(found, config, limited=True)[0]}
        rows.append(row)
    return rows


def _baselines(outcomes: Sequence[Outcome], config: BenchConfig) -> dict[str, Any]:
    """Return each baseline with the embedding that it is meant for: that of texts, if it was run."""
    embedding = "wordllama" if "wordllama" in config.embeddings else config.embeddings[0]
    first, pivot = _cell(config, "first", 1.0), _cell(config, "pivot", 1.0)
    found = {}
    others = [one for one in outcomes if one.system != OURS and one.embedding == embedding]
    for (name,), rows in _groups(others, lambda one: (one.system,)):
        found[name] = {
            "lifetime_fpr": _rate(_of(rows, "unseen families"), config)[0],
            "pivot_median_queries": _finite(median_queries([one.queries for one in _of(rows, pivot)])),
            "pivot_found": _found_share(_of(rows, pivot)),
            "campaign_median_queries": _finite(
                median_queries([one.queries for one in _of(rows, first) if one.template])
            ),
            "campaign_found": _found_share(_of(rows, first)),
        }
    return found


def _campaigns(outcomes: Sequence[Outcome]) -> frozenset[str]:
    return frozenset(one.family for one in outcomes if one.scene.startswith(("first", "pivot", "ramp", "release")))


def _cell(config: BenchConfig, start: str, share: float) -> str:
    return next((cell.name for cell in config.cells if cell.start == start and cell.share == share), "")


def _of(rows: Iterable[Outcome], scene: str) -> list[Outcome]:
    return [one for one in rows if one.scene == scene]


def _by(rows: Iterable[Outcome], name: str) -> list[tuple[str, list[Outcome]]]:
    return [(key, found) for (key,), found in _groups(rows, lambda one: (getattr(one, name),))]


def _groups(
    rows: Iterable[Outcome], key: Callable[[Outcome], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Outcome]]]:
    found: dict[tuple[Any, ...], list[Outcome]] = {}
    for one in rows:
        found.setdefault(key(one), []).append(one)
    return sorted(found.items(), key=lambda item: item[0])


def _found_share(rows: Sequence[Outcome]) -> float:
    """Return the share that was alarmed after the requests that count as a warm-up."""
    return float(np.mean([one.queries < np.inf for one in rows])) if rows else 0.0


def _rate(rows: Sequence[Outcome], config: BenchConfig, *, limited: bool = False) -> tuple[float, tuple[float, float]]:
    """Return a rate and its interval: the wider of one over families and one over seeds.

    A family comes in several seeds, and all that is tested in a seed has one calibration. What several families make up
    (``a+b``) counts with the first of them.
    """
    flags = [one.limit is not None if limited else one.alarmed for one in rows]
    rate, families = rate_interval(flags, [one.family.partition("+")[0] for one in rows], config.resamples)
    _, seeds = rate_interval(flags, [one.seed for one in rows], config.resamples)
    return rate, (min(families.low, seeds.low), max(families.high, seeds.high))


def _rate_json(rows: Sequence[Outcome], config: BenchConfig, *, limited: bool = False) -> dict[str, Any]:
    rate, (low, high) = _rate(rows, config, limited=limited)
    return {"rate": rate, "low": low, "high": high, "n": len(rows)}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
