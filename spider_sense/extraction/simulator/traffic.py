"""What a simulator makes: requests, and the stream of one principal."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from spider_sense.extraction.layout import LinkKind

__all__ = ["Request", "Stream", "texts_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, before anything is hashed."""

    text: str
    time: float
    """Seconds since the epoch."""
    max_tokens: int = 0
    """0 if the request set none."""
    top_logprobs: int = 0
    biased: tuple[int, ...] = ()
    attack: bool = False
    """Whether it belongs to a campaign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Everything one principal sends."""

    principal: str
    tenant: str
    """Declared type: the stratum."""
    family: str
    """What no two parts of a split share."""
    requests: tuple[Request, ...]
    parameters: tuple[tuple[str, float], ...] = ()
    """Sampling parameters, the same in every request."""
    links: tuple[tuple[LinkKind, str], ...] = ()
    campaign: str = ""
    group: str = ""
    """Organisation or campaign that the account belongs to; empty of a single one."""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def first_attack(self) -> int | None:
        """Index of the first request of a campaign."""
        return next((index for index, request in enumerate(self.requests) if request.attack), None)

    def linked(self, group: str, links: Iterable[tuple[LinkKind, str]]) -> "Stream":
        """Return the stream as an account of a group, with the group's link evidence."""
        return replace(self, group=group, links=tuple(links), principal=f"{group}/{self.principal}")


def texts_of(streams: Iterable[Stream]) -> list[str]:
    """Return the distinct texts of streams in the order of their first use."""
    return list(dict.fromkeys(request.text for stream in streams for request in stream.requests))
