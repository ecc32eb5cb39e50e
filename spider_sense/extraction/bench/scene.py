"""The streams of one seed: innocent principals in three parts, attackers, organisations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from spider_sense.extraction.bench.config import BenchConfig, Cell
from spider_sense.extraction.bench.parts import KINDS, Part, Split, split_families
from spider_sense.extraction.simulator.accounts import Evidence, campaign_accounts, organisation
from spider_sense.extraction.simulator.campaigns import Cover, Mixing, attacker
from spider_sense.extraction.simulator.families import Family, Kind
from spider_sense.extraction.simulator.tenants import Tenant, resampled, stream_of_texts
from spider_sense.extraction.simulator.traffic import Stream

__all__ = ["Scene", "families_with_real_apps"]

_SHORTEST = 24
_LASTING = 1 / 3
"""Share of innocent principals, outside calibration, that live as long as the bench looks; the others' lengths are
uniform."""

_SIZES = (2, 3, 4, 5, 8, 10, 10, 15, 25)
"""Accounts of an innocent organisation."""

_LARGE = 25

RealStreams = Mapping[str, tuple[str, tuple[str, ...]]]


def families_with_real_apps(
    families: Sequence[Family], real: RealStreams, texts: int
) -> tuple[tuple[Family, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Return the families and those of the real task bots, and the real people with their texts."""
    bots: dict[str, dict[str, None]] = {}
    people = []
    for principal, (family, said) in real.items():
        if family.startswith("app:"):
            bots.setdefault(family, {}).update(dict.fromkeys(said))
        else:
            people.append((principal, said))
    apps = [Family(name=name, kind="app", texts=tuple(said)[:texts]) for name, said in bots.items()]
    return (*families, *apps), tuple(people)


@dataclass(frozen=True)
class Scene:
    """Everything that one seed decides."""

    config: BenchConfig
    families: tuple[Family, ...]
    people: tuple[tuple[str, tuple[str, ...]], ...]
    seed: int

    @cached_property
    def split(self) -> Split:
        """Who is in which part."""
        return split_families(self.families, self.people, self.seed)

    def benign(self, part: Part, families_of: Part | None = None, salt: str = "") -> list[Stream]:
        """Return the innocent principals of a part, and real people with those who chat.

        Args:
            part: whose number of principals, and whose people.
            families_of: whose families; by default the part's own.
            salt: other principals of the same kinds.
        """
        count = getattr(self.config.principals, part)
        source = families_of or part
        streams: list[Stream] = []
        for kind in KINDS:
            people = self.split.people[source] if kind == "chat" and not salt else ()
            streams += [self._person(name, said) for name, said in people]
            for name in (f"{salt}{source}-{kind}-{place}" for place in range(count)):
                # Thresholds speak of lives as long as those of calibration.
                length = self.config.length if part == "calibrate" else self._length(name)
                streams.append(self.tenant(name, kind, source).stream(length))
        return streams

    def drawn_on(self, streams: Sequence[Stream]) -> list[Stream]:
        """Return streams of one length, the horizon: simulated and drawn again from a principal's own texts."""
        return [
            resampled(stream, self.config.horizon, np.random.default_rng([self.seed, *stream.principal.encode()]))
            for stream in streams
        ]

    def campaigns(self) -> tuple[Family, ...]:
        """Return the campaigns that nothing was fitted on."""
        return self.split.families["test", "campaign"]

    def attackers(self, cell: Cell) -> list[Stream]:
        """Return attackers of the test campaigns in one cell."""
        return [
            self._attacker(f"{cell.name}-{campaign.name}-{place}", campaign, cell, "test")
            for campaign in self.campaigns()
            for place in range(self.config.attackers)
        ]

    def without_attack(self, cell: Cell) -> list[Stream]:
        """Return the covers of a cell's attackers over the same requests, with no campaign: the control."""
        length = self._attack_length(cell)
        streams = []
        for campaign in self.campaigns():
            for place in range(self.config.attackers):
                name = f"{cell.name}-{campaign.name}-{place}"
                tenants = self.covers("test", name)(cell.cover)
                streams.append(replace(tenants[0].stream(length), principal=f"no-{name}"))
        return streams

    def other_work(self) -> list[Stream]:
        """Return innocent people who drop what they did for something else after the warm-up: a harder control."""
        length = self.config.warm_up + self.config.after
        streams = []
        for place in range(self.config.attackers * len(self.campaigns())):
            generator = np.random.default_rng([self.seed, place])
            before, after = generator.permutation(len(self.split.families["test", "chat"]))[:2].tolist()
            pair = [
                Tenant(name=f"{place}", kind="chat", families=[self.split.families["test", "chat"][index]])
                for index in (before, after)
            ]
            covers = [tenant.cover() for tenant in pair]
            texts = [next(covers[index >= self.config.warm_up]) for index in range(length)]
            streams.append(stream_of_texts(f"other-{place}", "chat", texts, generator, family="other work"))
        return streams

    def organisations(self, part: Part, *, one_subject: bool = False) -> list[tuple[Stream, ...]]:
        """Return innocent groups of 2 to 25 accounts: for each kind of tenant so many of that kind alone, and as many
        of all kinds.

        Args:
            part: whose families.
            one_subject: all members of a group ask the same one or two families; no group is of all kinds then.
        """
        groups = []
        for kind in KINDS if one_subject else (*KINDS, None):
            for place in range(getattr(self.config.organisations, part)):
                name = f"{part}-{kind or 'mixed'}-{'one' if one_subject else 'org'}{place}"
                generator = np.random.default_rng([self.seed, *name.encode()])
                size = int(generator.choice(_SIZES))
                kinds = [kind or KINDS[int(generator.integers(len(KINDS)))] for _ in range(size)]
                tenants = [self.tenant(f"{name}-{index}", one, part) for index, one in enumerate(kinds)]
                if one_subject:
                    few = generator.permutation(len(tenants[0].families))[: 1 + place % 2]
                    families = [tenants[0].families[index] for index in few]
                    tenants = [replace(tenant, families=families) for tenant in tenants]
                groups.append(organisation(name, tenants, self.config.group_requests, self.seed))
        return groups

    def campaign_groups(
        self,
        accounts: int,
        evidence: Evidence | None = None,
        parts: Callable[[Family], Sequence[Sequence[str]]] | None = None,
        cover: Cover = "same",
        campaigns: Sequence[Family] | None = None,
    ) -> list[tuple[Stream, ...]]:
        """Return the accounts of each test campaign: as many sets as there are attackers, one where a set is large.

        Args:
            accounts: of a set.
            evidence: what they share.
            parts: of a campaign's requests, one for each account in turn; by default all take from one list.
            cover: of each account.
            campaigns: other families than those, innocent ones as a control.
        """
        mixing = Mixing(share=self.config.group_share, cover=cover)
        groups = []
        for campaign in self.campaigns() if campaigns is None else campaigns:
            for place in range(self.config.attackers if accounts <= _LARGE else 1):
                name = f"ring-{campaign.name}-{place}-{accounts}-{cover}"
                groups.append(
                    campaign_accounts(
                        name,
                        campaign,
                        mixing,
                        self.covers("test", name, accounts),
                        accounts,
                        self.config.group_requests,
                        self.seed,
                        evidence,
                        parts and parts(campaign),
                    )
                )
        return groups

    def tenant(self, name: str, kind: Kind, part: Part) -> Tenant:
        """Return an innocent tenant of a part."""
        return Tenant(name=name, kind=kind, families=self.split.families[part, kind], seed=self.seed)

    def covers(self, part: Part, name: str, count: int = 4) -> Callable[[Cover], Sequence[Tenant]]:
        """Return what gives the innocent tenants behind which an account hides."""

        def choose(cover: Cover) -> Sequence[Tenant]:
            kind: Kind = "app" if cover == "app" else "chat"
            return [self.tenant(f"{name}-cover{place}", kind, part) for place in range(count)]

        return choose

    def _attacker(self, name: str, campaign: Family, cell: Cell, part: Part) -> Stream:
        mixing = Mixing(share=cell.share, cover=cell.cover, start=cell.start, warm_up=self.config.warm_up)
        return attacker(name, campaign, mixing, self.covers(part, name), self._attack_length(cell), self.seed)

    def _attack_length(self, cell: Cell) -> int:
        before = self.config.warm_up if cell.start in ("pivot", "release", "poison") else 0
        return before + self.config.after

    def _length(self, name: str) -> int:
        generator = np.random.default_rng([self.seed, 1, *name.encode()])
        lasts = generator.random() < _LASTING
        return self.config.length if lasts else int(generator.integers(_SHORTEST, self.config.length + 1))

    def _person(self, name: str, said: tuple[str, ...]) -> Stream:
        generator = np.random.default_rng([self.seed, *name.encode()])
        return stream_of_texts(name, "chat", said[: self.config.real_messages], generator, family="real people")
