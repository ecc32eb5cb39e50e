"""Leaks: a secret of one principal that appears in what another principal's agent writes.

Secrets are what the operator marks, and canaries that are made to be found. Nothing of them is kept but keyed digests
of their n-grams: without the operator's key nobody can tell from the digests whether a guess is right.
"""

import hashlib
import secrets
from collections import defaultdict
from dataclasses import dataclass

from spider_sense.errors import ConfigError
from spider_sense.screening.disguise import disguises, folded, unescaped
from spider_sense.screening.keys import OperatorKey

__all__ = ["Leak", "LeakWatch"]

N = 10
"""Letters and digits of an n-gram."""
SHARE = 1 / 3
"""Share of a secret's n-grams that must appear. Any ten letters may be anybody's; a third of a secret's are not."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A secret where it does not belong."""

    label: str
    """The operator's name for the secret."""
    owner: str
    """Principal whose it is."""
    form: str
    """As it is, or how it was disguised."""
    share: float
    """Of its n-grams that were found."""

    def __str__(self) -> str:
        return f"{self.share:.0%} of {self.owner}'s secret {self.label!r}, {self.form}"


@dataclass(frozen=True, slots=True)
class _Form:
    label: str
    owner: str
    readers: frozenset[str]
    name: str
    grams: frozenset[bytes]


class LeakWatch:
    """Remembers secrets by their digests and looks for them.

    Args:
        key: the operator's.
    """

    def __init__(self, key: OperatorKey) -> None:
        self._key = key.derived("leaks")
        self._forms: list[_Form] = []
        self._at: dict[bytes, list[int]] = defaultdict(list)

    def protect(self, owner: str, label: str, text: str, readers: frozenset[str] = frozenset()) -> None:
        """Mark a text as a principal's secret.

        Args:
            owner: the principal.
            label: a name for it, by which evidence speaks of it.
            text: the secret; it is not kept.
            readers: other principals who may repeat it.

        Raises:
            ConfigError: if it has too few letters and digits to be told from chance.
        """
        if len(folded(text)) < N:
            raise ConfigError(
                f"the secret {label!r} of {owner} has {len(folded(text))} letters and digits; "
                f"one of fewer than {N} cannot be told from chance, so make it longer"
            )
        for name, form in disguises(text):
            grams = self._grams(form)
            for gram in grams:
                self._at[gram].append(len(self._forms))
            if grams:
                self._forms.append(_Form(label, owner, readers | {owner}, name, grams))

    def canary(self, owner: str, label: str = "canary") -> str:
        """Return a new random text to be planted in a principal's context, and watch for it."""
        text = secrets.token_hex(12)
        self.protect(owner, label, text)
        return text

    def find(self, principal: str | None, text: str) -> list[Leak]:
        """Return the secrets in a text that are not for its writer to tell, the fullest first, one for each secret.

        Args:
            principal: whose agent wrote it; None may tell nobody's secrets.
            text: what it wrote.
        """
        found: dict[int, int] = defaultdict(int)
        for gram in frozenset[bytes]().union(*map(self._grams, {folded(text), folded(unescaped(text))})):
            for place in self._at.get(gram, ()):
                found[place] += 1
        leaks: dict[tuple[str, str], Leak] = {}
        for place, count in found.items():
            form = self._forms[place]
            share = count / len(form.grams)
            name = form.owner, form.label
            if principal not in form.readers and share >= SHARE and (name not in leaks or share > leaks[name].share):
                leaks[name] = Leak(form.label, form.owner, form.name, share)
        return sorted(leaks.values(), key=lambda leak: -leak.share)

    def _grams(self, text: str) -> frozenset[bytes]:
        data = [text[start : start + N].encode() for start in range(len(text) - N + 1)]
        return frozenset(hashlib.blake2b(gram, key=self._key, digest_size=8).digest() for gram in data)
