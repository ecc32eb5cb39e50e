"""Leaks: a secret of one principal that appears in what another principal's agent writes.

Secrets are what the operator marks, and canaries that are made to be found. Nothing of them is kept but keyed digests
of their n-grams: without the operator's key nobody can tell from the digests whether a guess is right.
"""

import secrets
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from spider_sense.errors import ConfigError
from spider_sense.screening.disguise import disguises, folded, unescaped
from spider_sense.screening.gaps import K, covered
from spider_sense.screening.keys import OperatorKey

__all__ = ["Leak", "LeakWatch"]

N = 10
"""Letters and digits of an n-gram."""
SHARE = 1 / 3
"""Share of a secret's n-grams that must appear. Any ten letters may be anybody's; a third of a secret's are not."""
LONG = 20
"""Letters and digits of a secret that is also looked for in pieces: the runs of a shorter one are anybody's."""
MOST = 200
"""Of a longer one, its first ones: each adds to what every text costs."""
VARIED = 6
"""Different letters of such a secret: all runs of bits stand in any text of bits."""
PIECES = 4 / 5
"""Share of its letters that must stand in order, with little between them."""
REPEATS = 8
"""Places of a secret at which the same run counts."""


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
    """Of its n-grams, or of its letters in pieces, that were found."""

    def __str__(self) -> str:
        return f"{self.share:.0%} of {self.owner}'s secret {self.label!r}, {self.form}"


@dataclass(frozen=True, slots=True)
class _Form:
    label: str
    owner: str
    readers: frozenset[str]
    name: str
    grams: frozenset[bytes]
    """None of a secret that is looked for in pieces."""
    letters: int

    @property
    def secret(self) -> tuple[str, str]:
        return self.owner, self.label


class LeakWatch:
    """Remembers secrets by their digests and looks for them.

    Args:
        key: the operator's.
    """

    def __init__(self, key: OperatorKey) -> None:
        # Copied for each digest: taking the key in takes longer than a run of letters does.
        self._keyed = blake2b(key=key.derived("leaks"), digest_size=8)
        self._forms: list[_Form] = []
        self._at: dict[bytes, list[int]] = defaultdict(list)
        self._runs: dict[bytes, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        """By run: the forms that have it, and where."""

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
            grams = frozenset(self._grams(form, N))
            for gram in grams:
                self._at[gram].append(len(self._forms))
            if grams:
                self._forms.append(_Form(label, owner, readers | {owner}, name, grams, len(form)))
        self._protect_pieces(owner, label, readers, folded(text))

    def _protect_pieces(self, owner: str, label: str, readers: frozenset[str], letters: str) -> None:
        letters = letters[:MOST]
        if len(letters) < LONG or len(set(letters)) < VARIED:
            return
        for place, run in enumerate(self._grams(letters, K)):
            places = self._runs[run][len(self._forms)]
            if len(places) < REPEATS:
                places.append(place)
        self._forms.append(_Form(label, owner, readers | {owner}, "in pieces", frozenset(), len(letters)))

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
        texts = {folded(text), folded(unescaped(text))}
        whole = [(form, share) for form, share in self._whole(texts) if principal not in form.readers]
        known = {form.secret for form, _ in whole}
        # What is found already, and what is the writer's to tell, is not looked for again: pieces are slow.
        sought = {
            place
            for place, form in enumerate(self._forms)
            if not form.grams and form.secret not in known and principal not in form.readers
        }
        pieces = [found for one in texts for found in self._in_pieces(one, sought)] if sought else []
        leaks: dict[tuple[str, str], Leak] = {}
        for form, share in sorted([*whole, *pieces], key=lambda item: -item[1]):
            leaks.setdefault(form.secret, Leak(form.label, form.owner, form.name, share))
        return list(leaks.values())

    def _whole(self, texts: set[str]) -> Iterator[tuple[_Form, float]]:
        """Return the forms of which enough n-grams stand in texts, wherever."""
        found: dict[int, int] = defaultdict(int)
        for gram in {gram for text in texts for gram in self._grams(text, N)}:
            for place in self._at.get(gram, ()):
                found[place] += 1
        for place, count in found.items():
            share = count / len(self._forms[place].grams)
            if share >= SHARE:
                yield self._forms[place], share

    def _in_pieces(self, text: str, sought: set[int]) -> Iterator[tuple[_Form, float]]:
        """Return the secrets, of those sought, of which enough letters stand in a text in order, not far apart."""
        found: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for place, run in enumerate(self._grams(text, K)):
            for form, places in self._runs.get(run, {}).items():
                if form in sought:
                    found[form].append((place, places))
        for form, runs in found.items():
            least = PIECES * self._forms[form].letters
            # Most have too few runs in common with a text to be worth a search.
            letters = covered(runs) if K * len({place for _, places in runs for place in places}) >= least else 0
            if letters >= least:
                yield self._forms[form], letters / self._forms[form].letters

    def _grams(self, text: str, n: int) -> list[bytes]:
        grams = [text[start : start + n] for start in range(len(text) - n + 1)]
        # The same few stand again and again.
        digests = {gram: self._digest(gram) for gram in set(grams)}
        return [digests[gram] for gram in grams]

    def _digest(self, gram: str) -> bytes:
        started = self._keyed.copy()
        started.update(gram.encode())
        return started.digest()
