"""A ruling on extraction as one HTML page that needs nothing from outside."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np

from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.decision import Decision, Tier
from spider_sense.extraction.limits import Limit, limits
from spider_sense.extraction.ruling import Ruling
from spider_sense.extraction.tiers import TieredDetector
from spider_sense.reporting.escaped import escaped
from spider_sense.reporting.extraction_pictures import calibration_picture, groups_picture, timeline_picture
from spider_sense.reporting.style import STYLE

__all__ = ["render_extraction"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_STYLE = (
    "figure img{max-width:100%;background:#fff;border-radius:4px}table{border-collapse:collapse}"
    "td,th{padding:4px 18px 4px 0;text-align:left;vertical-align:top}article ul{margin:8px 0 12px;padding-left:20px}"
)
_BADGES = {"watch": "clear", "limit": "suspect", "act": "breach"}
_TIERS: dict[Tier, str] = {
    "rule": "a fixed rule",
    "own": "change against its own history",
    "level": "level against honest principals",
    "group": "linked accounts together",
}
SHOWN = 20
"""Principals that are shown one by one."""
_LIMITS = (
    "What is bounded is the share of honest principals that are ever limited, if they are like those of calibration. "
    "Extraction is made dearer by this, not impossible.",
    "A principal that differs from all of calibration may be alarmed more often: look at the tenant types without "
    "a certified stratum first.",
    "Uncertified: calibration had too few honest principals of the tenant type, or none that lived as long, or nobody "
    "can be limited at all, and why stands beside it.",
    "The margin is what new kinds of work are expected to stay below; a threshold is never lower.",
    "A turn from its own history is only watched until the level is high as well: honest people change their work too.",
    "Honest evaluation harnesses and labelling tenants ask what a campaign asks. A finding is a reason to look, and a "
    "human decides.",
)


def render_extraction(artifact: Artifact, detector: TieredDetector, ruling: Ruling, origin: str) -> str:
    """Return the page; the same ruling always gives the same text.

    Args:
        artifact: the extraction guard.
        detector: made from it.
        ruling: what to show.
        origin: where the log comes from, in words.
    """
    limits = "".join(f"<li>{escaped(line)}</li>" for line in _LIMITS)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Spider-Sense: extraction</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f"{_header(artifact, ruling, origin)}{''.join(_principals(detector, ruling))}{_groups(ruling)}"
        f"{_calibration(artifact, ruling)}"
        f'<section class="limits"><h2>What these findings do not show</h2><ul>{limits}</ul></section>'
        "</main></body></html>\n"
    )


def _header(artifact: Artifact, ruling: Ruling, origin: str) -> str:
    worst = ruling.worst().values()
    counts = {level: sum(decision.level == level for decision in worst) for level in ("act", "limit", "watch")}
    requests = sum(state.count for state in ruling.states.values())
    calibration = artifact.calibration
    facts = [
        ("Model", artifact.base.base_model if artifact.base else "activations came with the log"),
        ("Hidden state", f"{artifact.site}, {artifact.width} wide"),
        ("Extraction guard", artifact.digest),
        ("Probes", ", ".join(artifact.sketch.names)),
        (
            "Honest principals ever limited",
            f"at most {calibration.budget.whole:.1%}" if calibration else "not calibrated: findings are not limited",
        ),
    ]
    listed = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
    return (
        f'<header><p class="brand">Spider-Sense</p><h1>Who is distilling this model</h1><p class="summary">'
        f"{escaped(origin)} {len(ruling.states)} principals, {requests} requests: {counts['act']} to act on, "
        f"{counts['limit']} to limit, {counts['watch']} to watch.</p><dl>{listed}</dl></header>"
    )


def _principals(detector: TieredDetector, ruling: Ruling) -> Iterator[str]:
    worst = ruling.worst()
    more = f"<p>The first {SHOWN} of {len(worst)}.</p>" if len(worst) > SHOWN else ""
    yield f"<section><h2>Principals</h2>{more or ('' if worst else '<p>Nothing was found.</p>')}"
    for name, decision in list(worst.items())[:SHOWN]:
        tenant = ruling.states[name].tenant
        tiers: tuple[Tier, ...] = ("own", "level")
        thresholds = {tier: detector.threshold(tier, tenant) for tier in tiers}
        picture = timeline_picture(ruling, name, thresholds)
        label = f'<span class="label">{escaped(tenant)}</span>' if tenant else ""
        yield (
            f'<article><h3><span class="badge {_BADGES[decision.level]}">{decision.level}</span> {escaped(name)} '
            f'<span class="label">{ruling.states[name].count} requests</span>{label}</h3>'
            f"<ul>{''.join(_findings(ruling, name))}</ul>"
            f'<figure><img alt="statistics of {escaped(name)} along its requests" src="{picture}"></figure></article>'
        )
    yield "</section>"


def _findings(ruling: Ruling, principal: str) -> Iterator[str]:
    for decision in ruling.decisions:
        if decision.principal == principal:
            yield f"<li>{escaped(_sentence(decision))}</li>"


def _sentence(decision: Decision) -> str:
    when = datetime.fromtimestamp(decision.time, UTC).strftime("%Y-%m-%d %H:%M")
    p_value = "" if decision.p_value in (None, 1) else f", p = {decision.p_value:.2g}"
    weak = "" if decision.certified else ", uncertified"
    return (
        f"{decision.level}, by {_TIERS[decision.tier]}, at request {decision.count} ({when} UTC{p_value}{weak}): "
        f"{'; '.join(decision.evidence)}"
    )


def _groups(ruling: Ruling) -> str:
    if not ruling.groups:
        return "<section><h2>Linked groups</h2><p>No accounts share evidence that is rare enough.</p></section>"
    picture = groups_picture(ruling.groups, ruling.worst())
    return (
        f"<section><h2>Linked groups</h2><p>{len(ruling.groups)} in all; filled members are limited or acted on.</p>"
        f'<figure><img alt="linked groups of accounts" src="{picture}"></figure></section>'
    )


def _calibration(artifact: Artifact, ruling: Ruling) -> str:
    calibration = artifact.calibration
    if calibration is None:
        return "<section><h2>Thresholds</h2><p>This extraction guard is not calibrated.</p></section>"
    tiers: tuple[Tier, ...] = ("own", "level")
    p_values = {
        tier: np.array(
            [
                calibration.p_value(tier, state.tenant, float(state.states[tier][0]))
                for state in ruling.states.values()
                if math.isfinite(float(state.states[tier][0]))
            ]
        )
        for tier in tiers
    }
    picture = calibration_picture(p_values, calibration)
    rows = "".join(_stratum(limit) for limit in limits(calibration, artifact.population))
    return (
        '<section><h2>Thresholds</h2><div class="pair"><figure>'
        f'<img alt="p-values of this log against honest principals" src="{picture}"></figure><table><tr><th>tier</th>'
        f"<th>stratum</th><th>n</th><th>threshold</th><th>margin</th><th>set by</th><th></th></tr>{rows}</table></div>"
        "</section>"
    )


def _stratum(limit: Limit) -> str:
    cells = (
        _TIERS[limit.tier],
        limit.stratum or "everybody",
        str(limit.count),
        *limit.words,
    )
    return f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>"
