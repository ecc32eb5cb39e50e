"""``spider-sense principals clear`` and ``unclear``."""

import time
from functools import partial
from typing import TYPE_CHECKING

from spider_sense.cli.app import console
from spider_sense.cli.principals_store import Config, Names, clears_in, found_in, opened, warn

if TYPE_CHECKING:
    from spider_sense.extraction.decision import Decision
    from spider_sense.extraction.stores import Entry

__all__ = ["clear", "unclear"]


def clear(config: Config, names: Names) -> None:
    """Take back what was decided. The evidence stays: a higher level, or more than this, can be found anew."""
    from spider_sense.extraction.clearing import cleared, record_of

    with opened(config) as (_, _, store):
        found, damaged = found_in(store)
        warn("nothing was found about", [name for name in names if name not in {*dict(found), *damaged}])
        before, now = clears_in(store), time.time()
        mine = {name: [decision for other, decision in found if other == name] for name in names}
        records = {name: record_of(cleared(before.get(name, ()), new, now)) for name, new in mine.items()}
        console.print(f"the findings about {store.clear(records)} of {len(names)} principals are gone", highlight=False)


def unclear(config: Config, names: Names) -> None:
    """Take clears back: what was found of one account stands again, a group is looked for by the next review."""
    with opened(config) as (_, _, store):
        clears = clears_in(store)
        warn("nothing was cleared of", [name for name in names if name not in dict(store.cleared())])
        alone = {
            name: [each.finding for each in clears[name] if each.finding.accounts == 1]
            for name in names
            if name in clears
        }
        # Who is not cleared any more was not seen by that, and is not kept for longer.
        store.update({name: partial(_restored, findings) for name, findings in alone.items() if findings}, seen=0)
        console.print(f"the clears of {store.unclear(names)} of {len(names)} principals are gone", highlight=False)


def _restored(findings: "list[Decision]", entry: "Entry | None") -> "Entry":
    from dataclasses import replace

    from spider_sense.errors import StateError
    from spider_sense.extraction.standing import decision_of, strictest, text_of

    if entry is None:
        raise StateError(f"{findings[0].principal!r} was erased meanwhile; leave it out")
    highest = strictest([*([decision_of(entry.standing)] if entry.standing else []), *findings])
    return entry if highest is None else replace(entry, standing=text_of(highest))
