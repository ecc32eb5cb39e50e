"""Who sends a request: nobody is who they say they are, unless the operator's proxy or an API key says it."""

import hashlib

import pytest

from spider_sense.serving.principals import UNKNOWN, Principals


def test_the_header_of_the_proxy_is_believed() -> None:
    by_header = Principals("X-Principal", ["secret"])
    assert by_header.principal([(b"host", b"x"), (b"x-principal", b" team-a ")]) == "team-a"
    assert by_header.principal([(b"x-principal", "caf\xe9".encode("latin-1"))]) == "caf\xe9"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="none"),
        pytest.param([(b"x-principal", b"  ")], id="empty"),
        # A proxy that adds its header to the client's tells nobody apart.
        pytest.param([(b"x-principal", b"admin"), (b"x-principal", b"team-a")], id="two"),
        pytest.param([(b"authorization", b"Bearer secret")], id="another"),
    ],
)
def test_who_does_not_say_once_is_unknown(headers: list[tuple[bytes, bytes]]) -> None:
    assert Principals("X-Principal", ["secret"]).principal(headers) == UNKNOWN


def test_a_key_tells_by_its_digest_and_never_itself() -> None:
    by_key = Principals(None, ["secret", "other"])
    assert by_key.principal([(b"authorization", b"Bearer secret")]) == hashlib.sha256(b"secret").hexdigest()[:16]
    assert by_key.principal([(b"authorization", b"bearer other")]) == hashlib.sha256(b"other").hexdigest()[:16]
    for value in (b"Bearer wrong", b"Basic secret", b"secret", b"Bearer "):
        assert by_key.principal([(b"authorization", value)]) == UNKNOWN
    assert by_key.principal([(b"x-principal", b"team-a")]) == UNKNOWN
    # vLLM lets in by the first, so that is who it is.
    two = [(b"authorization", b"Bearer other"), (b"authorization", b"Bearer secret")]
    assert by_key.principal(two) == hashlib.sha256(b"other").hexdigest()[:16]
    assert by_key.principal([(b"authorization", b"Bearer wrong"), *two]) == UNKNOWN
