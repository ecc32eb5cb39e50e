"""Leaks: a secret is found in the mouth of another, however it is dressed, and is never kept."""

import base64
import codecs
import pickle
import re
import time
from pathlib import Path
from random import Random
from string import ascii_lowercase

import pytest

from spider_sense.corpus import load_corpus
from spider_sense.errors import ConfigError
from spider_sense.screening.disguise import folded
from spider_sense.screening.gaps import covered
from spider_sense.screening.keys import OperatorKey
from spider_sense.screening.leaks import LeakWatch
from spider_sense.screening.secret_file import protect_all

SECRET = "The vault opens with 7-Alpha-Tango-93, Thursdays."
OTHER = "The weather on Thursday was fine, and the vault stayed shut while we talked of alpha testing in the garden."


@pytest.fixture
def watch() -> LeakWatch:
    found = LeakWatch(OperatorKey(b"k" * 32))
    found.protect("ann", "vault", SECRET)
    return found


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("as it is", SECRET),
        ("as it is", SECRET.upper()),
        ("as it is", " . ".join(SECRET)),
        ("as it is", SECRET.replace("a", "\uff41")),  # a full-width letter
        ("as it is", "opens with 7-Alpha-Tango-93"),
        ("as it is", SECRET.replace("a", "\u00e1").replace("e", "e\u0301")),  # accents
        ("as it is", SECRET.translate(str.maketrans("aeopcT", "\u0430\u0435\u043e\u0440\u0441\u0422"))),  # Cyrillic
        ("as it is", SECRET.translate(str.maketrans("oTA", "\u03bf\u03a4\u0391"))),  # Greek
        ("as it is", "".join(f"\\u{ord(letter):04x}" for letter in SECRET)),
        ("as it is", "".join(f"\\x{ord(letter):02X}" for letter in SECRET)),
        ("as it is", re.sub("[aeiou7]", lambda found: f"%{ord(found[0]):02x}", SECRET)),
        ("as it is", "".join(f"&#{ord(letter)};" for letter in SECRET)),
        ("reversed", SECRET[::-1]),
        ("in rot13", codecs.encode(SECRET, "rot13")),
        ("in hexadecimal", SECRET.encode().hex(" ")),
        ("in base64", base64.b64encode(SECRET.encode()).decode()),
        ("in base64", base64.b64encode(b"x" + SECRET.encode() + b"yz").decode()),
        ("in base64", base64.b64encode(b"xy" + SECRET.encode()).decode()),
        *(("in base32", base64.b32encode(b"xyzw"[:n] + SECRET.encode() + b"?").decode()) for n in range(5)),
    ],
)
def test_a_secret_is_found(watch: LeakWatch, form: str, text: str) -> None:
    (leak,) = watch.find("bob", f"Well, {OTHER} {text} {OTHER}")
    assert (leak.owner, leak.label, leak.form) == ("ann", "vault", form)
    assert leak.share >= 1 / 3
    assert watch.find(None, text)


def letters(count: int, seed: int = 0) -> str:
    return "".join(Random(seed).choices(ascii_lowercase[:25], k=count))


def split(text: str, size: int, between: str) -> str:
    return between.join(text[start : start + size] for start in range(0, len(text), size))


@pytest.mark.parametrize("size", [4, 5, 7, 10, 13])
@pytest.mark.parametrize("between", [" sunshine ", " and then he said that ", "%20over%20the%20hills%20"])
def test_words_between_hide_nothing(watch: LeakWatch, size: int, between: str) -> None:
    canary = watch.canary("ann")
    for label, secret in (("vault", SECRET), ("canary", canary)):
        text = f"{OTHER} {split(re.sub('[^A-Za-z0-9]', '', secret), size, between)} {OTHER}"
        assert [leak.label for leak in watch.find("bob", text)] == [label]
        assert watch.find("ann", text) == []


def test_pieces_count_in_order_and_near_to_one_another(watch: LeakWatch) -> None:
    pieces = [SECRET[start : start + 9] for start in range(0, len(SECRET), 9)]
    assert watch.find("bob", " but ".join(pieces))
    assert watch.find("bob", " but ".join(reversed(pieces))) == []
    assert watch.find("bob", f" {'far away ' * 8} ".join(pieces)) == []
    # A decoy of the middle before it all changes nothing.
    assert watch.find("bob", f"{pieces[2]} {' but '.join(pieces)}")


def test_at_most_forty_letters_stand_between() -> None:
    watch = LeakWatch(OperatorKey(b"k" * 32))
    secret = letters(40)
    watch.protect("ann", "x", secret)
    assert watch.find("bob", split(secret, 8, "-" * 50 + "z" * 40))
    assert watch.find("bob", split(secret, 8, "z" * 41)) == []


def test_a_run_counts_wherever_it_stands(watch: LeakWatch) -> None:
    watch.protect("ann", "doors", "open door open gate open lock")
    (leak,) = watch.find("bob", "open the door, then open a gate, then open any lock")
    assert (leak.label, leak.form) == ("doors", "in pieces")


@pytest.mark.parametrize(
    ("found", "count"),
    [
        ([(0, [0]), (10, [1])], 5),  # they overlap in the secret
        ([(0, [0]), (1, [10])], 5),  # in the text
        ([(0, [0]), (10, [10])], 8),
        ([(0, [10]), (10, [0])], 4),
        # The first of the chain is too far from the second 4, which therefore is the worse one.
        ([(0, [0]), (4, [4]), (46, [4]), (47, [8])], 12),
    ],
)
def test_letters_count_once(found: list[tuple[int, list[int]]], count: int) -> None:
    assert covered(found) == count


def test_what_is_too_long_short_or_plain_is_not_looked_for_in_pieces() -> None:
    watch = LeakWatch(OperatorKey(b"k" * 32))
    long, short, bits = letters(1000), letters(20, 1), "".join(Random(2).choices("01", k=40))
    for label, secret in (("long", long), ("short", short[:19]), ("bits", bits)):
        watch.protect("ann", label, secret)
    assert [leak.label for leak in watch.find("bob", split(long[:200], 5, " but "))] == ["long"]
    for other in (long[200:], short, bits):
        assert watch.find("bob", split(other, 5, " but ")) == []
    watch.protect("ann", "short", short)
    assert [leak.label for leak in watch.find("bob", split(short, 5, " but "))] == ["short"]


def test_secrets_that_are_long_take_no_time() -> None:
    watch = LeakWatch(OperatorKey(b"k" * 32))
    words = [word for row in load_corpus() for word in row.text.split()]
    for number in range(20):
        watch.protect("ann", str(number), " ".join(words[number * 300 :][:800]))
    watch.protect("ann", "bits", "".join(Random(2).choices("01", k=256)))
    text = " ".join(Random(3).sample(words, len(words)))[:50_000] + "".join(Random(4).choices("01", k=5000))
    start = time.process_time()
    watch.find("bob", text)
    assert time.process_time() - start < 3


def test_ordinary_texts_have_no_pieces_in_common() -> None:
    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday" and len(folded(row.text)) > 20]
    watch, words = LeakWatch(OperatorKey(b"k" * 32)), " ".join(texts[:100]).split()
    phrases = [" ".join(words[start : start + 4]) for start in range(0, len(words), 3)]
    for number, text in enumerate([*texts[:100], *(phrase for phrase in phrases if len(folded(phrase)) >= 10)]):
        watch.protect("ann", str(number), text)
    assert "in pieces" not in {leak.form for leak in watch.find("bob", " ".join(texts[100:]))}
    assert watch.find("bob", split(texts[0], 6, " so "))


def test_an_escape_of_no_letter_hides_nothing(watch: LeakWatch) -> None:
    assert watch.find("bob", SECRET.replace(" ", r"\u{ffffff}").replace("-", r"\ud800"))


def test_its_owner_and_readers_may_tell_it(watch: LeakWatch) -> None:
    assert watch.find("ann", SECRET) == []
    watch.protect("ann", "rota", "Ann is on call until the fourth of March", frozenset({"bob"}))
    assert watch.find("bob", "Ann is on call until the fourth of March") == []
    assert len(watch.find("carol", "Ann is on call until the fourth of March")) == 1


def test_what_is_like_a_secret_is_none(watch: LeakWatch) -> None:
    assert watch.find("bob", OTHER) == []
    assert watch.find("bob", "") == []
    assert watch.find("bob", "The vault opens") == []


def test_nothing_of_it_is_kept(watch: LeakWatch) -> None:
    kept = pickle.dumps({name: value for name, value in vars(watch).items() if name not in ("_keyed", "_runs")})
    kept += pickle.dumps([*watch._runs])
    for piece in ("Alpha", "alpha", "tango93", SECRET[5:15], SECRET.encode().hex()[:12]):
        assert piece.encode() not in kept
    other = LeakWatch(OperatorKey(b"j" * 32))
    other.protect("ann", "vault", SECRET)
    assert not set(watch._at) & set(other._at)


def test_canaries(watch: LeakWatch) -> None:
    one, other = watch.canary("ann"), watch.canary("ann", "second")
    assert one != other
    assert [leak.label for leak in watch.find("bob", f"I was told {one}.")] == ["canary"]
    assert [leak.label for leak in watch.find("bob", f"{other[:20]}")] == ["second"]
    assert watch.find("ann", one) == []


def test_a_short_secret_is_refused(watch: LeakWatch) -> None:
    with pytest.raises(ConfigError, match="'pin' of ann has 4 letters and digits") as caught:
        watch.protect("ann", "pin", "4 7-1!1")
    assert "4711" not in str(caught.value)


def test_a_file_of_secrets(watch: LeakWatch, tmp_path: Path) -> None:
    file = tmp_path / "secrets.jsonl"
    file.write_text(
        '{"owner": "bob", "label": "plan", "text": "launch the balloon at dawn", "readers": ["dan"]}\n\n'
        '{"owner": "bob", "label": "code", "text": "correct horse battery staple"}\n'
    )
    assert protect_all(watch, file) == 2
    assert [leak.label for leak in watch.find("ann", "Launch the balloon at dawn!")] == ["plan"]
    assert watch.find("dan", "Launch the balloon at dawn!") == []
    for line, message in (
        ('{"owner": "bob", "label": "x"}', "line 1: text"),
        ('{"owner": "bob", "label": "x", "text": "sesame opens the door", "more": 1}', "line 1: more"),
        ("sesame opens the door", "line 1: line: Invalid JSON"),
    ):
        file.write_text(line)
        with pytest.raises(ConfigError, match=message) as caught:
            protect_all(watch, file)
        assert "sesame" not in str(caught.value)
    with pytest.raises(ConfigError, match="name a file of JSON lines"):
        protect_all(watch, tmp_path / "none")
