"""Envelopes: nobody without the key can write or move one."""

import math
from datetime import datetime, tzinfo
from typing import Any

import pytest

from spider_sense.errors import ConfigError, SignatureError
from spider_sense.screening.envelope import Sealer
from spider_sense.screening.keys import OperatorKey
from spider_sense.screening.verdict import StageVerdict

KEY = OperatorKey(b"k" * 32)


@pytest.fixture
def sealed(tools: Any) -> dict[str, Any]:
    verdict = StageVerdict(
        artifact=tools.artifact("plan"), zone="suspect", outcome="accept", decided_by="judge", evidence=""
    )
    return Sealer(KEY).seal("the message", "ann", "bob", verdict)


def test_an_envelope_is_opened_by_its_receiver(sealed: dict[str, Any]) -> None:
    opened = Sealer(KEY).open(sealed, "the message", "bob")
    assert (opened.sender, opened.stage, opened.zone, opened.outcome) == ("ann", "plan", "suspect", "accept")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sender", "root"), ("zone", "clear"), ("outcome", "reject"), ("stage", "query"), ("issued", "x"), ("mac", "0"),
     ("mac", ""), ("mac", "\udcff é"), ("receiver", "carol")],
)  # fmt: skip
def test_no_field_can_be_changed(sealed: dict[str, Any], field: str, value: str) -> None:
    with pytest.raises(SignatureError, match="was not made for this text with the operator's key"):
        Sealer(KEY).open(sealed | {field: value}, "the message", "bob")


def test_nor_the_text_the_key_or_the_receiver(sealed: dict[str, Any]) -> None:
    with pytest.raises(SignatureError, match="not made for this text"):
        Sealer(KEY).open(sealed, "the message ", "bob")
    with pytest.raises(SignatureError, match="not made for this text"):
        Sealer(OperatorKey(b"j" * 32)).open(sealed, "the message", "bob")
    with pytest.raises(SignatureError, match="is for bob, not for carol"):
        Sealer(KEY).open(sealed, "the message", "carol")
    with pytest.raises(SignatureError, match="is for bob, not for nobody"):
        Sealer(KEY).open(sealed, "the message", None)


def test_an_old_envelope_is_believed_no_more(sealed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Later":
            return cls.fromtimestamp(datetime.now(tz).timestamp() + 4000, tz)

    monkeypatch.setattr("spider_sense.screening.envelope.datetime", Later)
    with pytest.raises(SignatureError, match=r"is 40\d\d seconds old, more than 3600; send it anew"):
        Sealer(KEY).open(sealed, "the message", "bob")
    assert Sealer(KEY, lifetime=5000).open(sealed, "the message", "bob").sender == "ann"
    assert Sealer(KEY, lifetime=math.inf).open(sealed, "the message", "bob").sender == "ann"


@pytest.mark.parametrize("record", [{}, [], None, "x", {"sender": "ann", "more": 1}, {"outcome": "open sesame"}])
def test_what_is_no_envelope(record: Any) -> None:
    with pytest.raises(SignatureError, match="has not the form of one"):
        Sealer(KEY).open(record, "the message", "bob")


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="31 bytes, fewer than 32"):
        OperatorKey(b"k" * 31)
    with pytest.raises(ConfigError, match="NO_KEY holds no key"):
        OperatorKey.from_env("NO_KEY")
    monkeypatch.setenv("A_KEY", "k" * 32)
    assert OperatorKey.from_env("A_KEY").derived("a") == KEY.derived("a")
    assert KEY.derived("a") != KEY.derived("b")
    assert "k" * 8 not in repr(KEY)
