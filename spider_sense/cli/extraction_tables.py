"""What ``spider-sense extraction`` and ``principals`` print: thresholds, findings, linked groups."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.table import Table

from spider_sense.cli.plain import plain

if TYPE_CHECKING:
    from spider_sense.extraction.decision import Decision
    from spider_sense.extraction.population import Population
    from spider_sense.extraction.rows import Row
    from spider_sense.extraction.ruling import Ruling
    from spider_sense.extraction.thresholds import Calibration

__all__ = ["findings_table", "group_lines", "limits_table", "selection_lines", "warn_of_limits", "warn_of_links"]

NAMED = 10
"""Members of a group, or of those selected, that are named."""


def limits_table(calibration: "Calibration", population: "Population") -> Table:
    """Return the thresholds, and what each rests on."""
    from spider_sense.extraction.limits import limits

    table = Table(title="Thresholds over principals", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("tier", "stratum", "n", "requests", "share", "threshold", "margin"):
        table.add_column(name, no_wrap=True)
    for name in ("set by", ""):
        table.add_column(name, overflow="fold")
    table.caption = (
        "share: of honest principals, or linked groups, that may ever be limited\n"
        "margin: what new kinds of work are expected to stay below; a threshold is never lower"
    )
    for limit in limits(calibration, population):
        table.add_row(
            limit.tier,
            plain(limit.stratum or "everybody"),
            str(limit.count),
            "" if limit.tier == "group" else str(calibration.horizons.get(limit.stratum, "")),
            f"{calibration.budget.share(limit.tier):.2%}",
            *limit.words,
        )
    return table


def warn_of_limits(calibration: "Calibration", population: "Population") -> None:
    """Say which claims do not hold, and which tiers limit nobody."""
    from spider_sense.extraction.limits import limits
    from spider_sense.extraction.thresholds import CERTIFIED, EVERYBODY

    weak = [tier for tier in calibration.maxima if not calibration.enough(tier, EVERYBODY)]
    if weak:
        found = ", ".join(f"{tier} on {len(calibration.maxima[tier][EVERYBODY])}" for tier in weak)
        typer.echo(
            f"warning: uncertified: {found}; {CERTIFIED} honest principals (for groups: honest linked groups) are "
            "needed",
            err=True,
        )
    if calibration.unnamed:
        typer.echo(
            f"warning: level is uncertified: {calibration.unnamed} of {len(calibration.maxima['own'][EVERYBODY])} "
            "honest principals have no `family` and count as a kind of work each, so the margin for new kinds is too "
            "small, and the thresholds hold for these kinds of work alone; give each the kind of work that it does",
            err=True,
        )
    if calibration.unnamed_groups:
        typer.echo(
            f"warning: group is uncertified: {calibration.unnamed_groups} of "
            f"{len(calibration.maxima['group'][EVERYBODY])} honest linked groups have members without `family` and "
            "count as no kind of work, so the margin for new kinds rests on the other groups alone; give each "
            "principal the kind of work that it does",
            err=True,
        )
    silent: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for limit in limits(calibration, population):
        name = limit.stratum or "everybody"
        if limit.never:
            silent[limit.tier, limit.never, limit.remedy].append(name)
    for (tier, never, remedy), strata in silent.items():
        typer.echo(f"warning: {tier} never limits {', '.join(strata)}: {never}; {remedy}", err=True)


def warn_of_links(population: "Population", rows: "Sequence[Row]") -> None:
    """Say how much evidence a link needs, and whether a log has so much."""
    from spider_sense.extraction.groups import ACCOUNT, kinds_needed

    needed = kinds_needed(population)
    measured = [kind for kind in ACCOUNT if kind != "declared"]
    have = [kind for kind in measured if any(kind in row.links for row in rows)]
    typer.echo(
        f"on a fit of {population.principals} principals, accounts are linked that share {needed} "
        f"kind{'s' if needed > 1 else ''} of evidence ({', '.join(measured)}), or that an operator declares to be one"
    )
    if len(have) < needed and not any("declared" in row.links for row in rows):
        typer.echo(
            f"warning: linked groups can hardly be found: this log has {', '.join(have) or 'none of them'}; log more "
            "kinds in `links`, fit on more principals, or declare links",
            err=True,
        )


def findings_table(ruling: "Ruling") -> Table:
    """Return what was found at each principal's highest level, a row for each tier."""
    table = Table(title="Findings, the highest of each principal", box=box.SIMPLE_HEAD)
    for name in ("principal", "level", "tier", "at request", "p"):
        table.add_column(name, no_wrap=True)
    table.add_column("evidence", overflow="fold")
    for name, findings in ruling.highest().items():
        for place, decision in enumerate(findings):
            # Of 1 it tells nothing: nobody was there to compare with.
            p_value = "" if decision.p_value in (None, 1) else f"{decision.p_value:.2g}"
            words = plain("; ".join(decision.evidence))
            table.add_row(
                plain("" if place else name), decision.level, decision.tier, str(decision.count), p_value, words
            )
    return table


def group_lines(decisions: "Sequence[Decision]") -> Iterator[str]:
    """Yield who is in each linked group that was found, and its level."""
    from spider_sense.extraction.standing import strictest

    found: dict[tuple[str, ...], list[Decision]] = defaultdict(list)
    for decision in decisions:
        if decision.group:
            found[decision.group].append(decision)
    for members, about in found.items():
        highest = strictest(about)
        assert highest is not None
        yield f"group, {highest.level}: {_named(members)}"


def selection_lines(decisions: "Sequence[Decision]") -> Iterator[str]:
    """Yield who was selected, by level."""
    selected: dict[str, list[str]] = defaultdict(list)
    for decision in decisions:
        if not decision.group:
            selected[decision.level].append(decision.principal)
    for level, names in selected.items():
        yield f"selected, {level}: {_named(names)}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
