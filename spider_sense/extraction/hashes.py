"""What is kept of a request's texts; serving and logs both come here, so that the same request is the same event."""

from dataclasses import dataclass
from typing import Self

from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import LinkKind
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.turns import Parts

__all__ = ["Hashes"]


@dataclass(frozen=True, slots=True)
class Hashes:
    """Of one request; the texts are gone."""

    opening: int = 0
    """Keyed hash of the masked opening of the user's last turn; 0 is unknown."""
    links: tuple[tuple[LinkKind, int], ...] = ()
    """That of the system prompt, if the client wrote one."""
    known_list: int = -1
    """Index of the known query list that the user's last turn stands in, or -1."""

    @classmethod
    def of(cls, parts: Parts, key: Key, lists: KnownLists | None) -> Self:
        """Hash the parts of a prompt."""
        return cls(
            opening=key.opening(parts.text),
            links=(("prefix", key.hash("prefix", parts.prefix)),) if parts.prefix else (),
            known_list=-1 if lists is None or not parts.text else lists.find(parts.text),
        )
