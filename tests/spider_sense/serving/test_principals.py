"""Who sends a request: nobody is who they say they are, unless the operator's proxy or an API key says it."""

import hashlib
from types import SimpleNamespace

import pytest

from spider_sense.serving.principals import UNKNOWN, Principals, name_principal, principal_of


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


def test_what_a_client_writes_in_its_place_is_overwritten() -> None:
    sent = {"spider_sense_principal": "admin", "own": 1}
    params = SimpleNamespace(extra_args=sent)
    name_principal(params, "team-a")
    assert principal_of(params) == "team-a"
    assert params.extra_args["own"] == 1
    name_principal(params, None)
    assert principal_of(params) is None
    assert params.extra_args == {"own": 1}
    assert sent["spider_sense_principal"] == "admin", "what others share is left as it is"


@pytest.mark.parametrize("extra", [None, {}, {"own": 1}, {"spider_sense_principal": ["a"]}])
def test_a_request_that_nobody_named_has_no_principal(extra: dict[str, object] | None) -> None:
    assert principal_of(SimpleNamespace(extra_args=extra)) is None
    assert principal_of(None) is None
