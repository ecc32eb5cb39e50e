"""What only a whole population shows: linked groups, and whom to act on if few of those may be honest."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.decision import LEVELS, TIERS, Decision, Level, Tier
from spider_sense.extraction.discovery import benjamini_hochberg
from spider_sense.extraction.groups import Group, judged, stacked
from spider_sense.extraction.layout import States
from spider_sense.extraction.likeness import COMMON, group_likeness, group_shares
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.thresholds import EVERYBODY, Calibration
from spider_sense.extraction.tiers import TieredDetector

__all__ = ["review"]

DISCOVERY = 0.05
"""Bound on the expected share of honest principals among those that are selected."""
WATCHED = 0.05
"""Share of honest groups that may be watched."""
UNCALIBRATED = 0.5
"""Score from which a group is watched if calibration had too few groups to tell."""
_LIMIT = LEVELS.index("limit") + 1
_NONE: tuple[float, Tier] = 1.0, "level"


def review(detector: TieredDetector, states: Mapping[str, PrincipalState]) -> tuple[Decision, ...]:
    """Return findings about groups, one for each member, and about principals that were selected together."""
    found: list[Decision] = []
    for group, tenant, score in judged(states, detector.population):
        members = stacked({name: states[name] for name in group.members})
        found += _judge_group(detector, group, members, tenant, score)
    return (*found, *_discoveries(detector, states))


def _judge_group(
    detector: TieredDetector, group: Group, members: States, tenant: str, score: float
) -> Iterator[Decision]:
    together = _together(members)
    if int(detector.rules.judge(together)[0]) == len(LEVELS):
        words = (group.evidence(), *detector.rules.evidence(together, 0))
        yield from _of_members(group, members, "rule", "act", float(len(LEVELS)), 1.0, None, True, words, EVERYBODY)
    calibration, threshold = detector.calibration, detector.threshold("group", tenant)
    watch = np.inf if calibration is None else calibration.threshold("group", tenant, WATCHED)
    watch = UNCALIBRATED if watch == np.inf else watch
    if score <= min(threshold, watch):
        return
    p_value = None if calibration is None else calibration.p_value("group", tenant, score)
    certified = calibration is not None and calibration.certified("group", tenant)
    also = int((members["decided"][:, [TIERS.index("own"), TIERS.index("level")]] >= _LIMIT).any(axis=1).sum())
    level: Level = "watch" if score <= threshold else "act" if also else "limit"
    words = (group.evidence(), *_group_words(calibration, tenant, members, score))
    words += (f"{also} of these accounts were limited for what each did alone",) if also else ()
    crossed = threshold if score > threshold else watch
    yield from _of_members(group, members, "group", level, score, crossed, p_value, certified, words, tenant)


def _group_words(calibration: Calibration | None, tenant: str, members: States, score: float) -> Iterator[str]:
    alike, high = group_shares(members)
    yield f"{alike:.0%} of their requests open with the same words"
    yield (
        f"{high:.0%} of their requests look like those that are sent to train another model, where {1 - COMMON:.0%} of "
        "honest requests do"
    )
    if (contrast := group_likeness(members).contrast) > 0:
        yield f"for what these accounts have in common they score {contrast:.2f}, where most honest groups are below 0"
    if calibration is not None:
        honest = calibration.maxima["group"][calibration.stratum("group", tenant)]
        above = int((honest >= score).sum())
        yield (
            f"of {len(honest)} honest groups in calibration {above} look as much like it"
            if len(honest)
            else "calibration had no honest group to compare them with"
        )


def _of_members(
    group: Group,
    members: States,
    tier: Tier,
    level: Level,
    score: float,
    threshold: float,
    p_value: float | None,
    certified: bool,
    words: tuple[str, ...],
    stratum: str,
) -> Iterator[Decision]:
    for name, state in zip(group.members, members, strict=True):
        yield Decision(
            principal=name,
            level=level,
            tier=tier,
            score=score,
            threshold=threshold,
            p_value=p_value,
            count=int(state["count"]),
            time=float(state["last"]),
            stratum=stratum,
            certified=certified,
            evidence=words,
            group=group.members,
        )


def _together(members: States) -> States:
    """Return one state with what all members did with logit biases, as if one account had."""
    one = members[:1].copy()
    for name in ("count", "sketched", "biased_requests", "revealed", "max_tokens"):
        one[name] = members[name].sum(axis=0)
    one["biased_ids"] = members["biased_ids"].max(axis=0)
    one["widest_bias"] = members["widest_bias"].max()
    one["list_hits"] = members["list_hits"].sum(axis=0)
    return one


def _discoveries(detector: TieredDetector, states: Mapping[str, PrincipalState]) -> Iterator[Decision]:
    """Yield whom Benjamini and Hochberg's procedure selects; their p-values split the budget over the tiers.

    Who crossed no threshold has a p-value of 1: among few principals, or many attackers, the procedure alone would
    select more of the honest than may ever be limited.
    """
    calibration = detector.calibration
    if calibration is None or not states:
        return
    states_N = stacked(states)
    limited_N4 = detector.levels(states_N, detector.rules.found(states_N)) >= _LIMIT
    best = {
        name: min(_p_values(calibration, state, limited), default=_NONE)
        for (name, state), limited in zip(states.items(), limited_N4, strict=True)
    }
    chosen = benjamini_hochberg(np.array([p for p, _ in best.values()]), DISCOVERY)
    for (name, (p_value, tier)), selected in zip(best.items(), chosen.tolist(), strict=True):
        if selected:
            found = detector.decision(states[name].states, tier, "act", name)
            said = f"selected among {len(states)} principals at a false-discovery rate of {DISCOVERY:.0%}"
            yield replace(found, p_value=p_value, evidence=(said, *found.evidence))


def _p_values(
    calibration: Calibration, state: PrincipalState, limited: NDArray[np.bool_]
) -> Iterator[tuple[float, Tier]]:
    whole = calibration.budget.whole
    tiers: tuple[Tier, ...] = ("own", "level")
    for tier in tiers:
        if limited[TIERS.index(tier)]:
            p_value = calibration.p_value(tier, state.tenant, float(state.states[tier][0]))
            yield min(p_value * whole / calibration.budget.share(tier), 1.0), tier
