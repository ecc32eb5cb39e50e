"""The front end: notes are taken off and counted, spans carry the verdict, the endpoint is there if a guard is."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError, MissingExtraError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.serving import front_seams
from spider_sense.serving.about import about
from spider_sense.serving.door import PRINCIPAL
from spider_sense.serving.findings import Note
from spider_sense.serving.reasoning import Hush
from spider_sense.serving.settings import ServingSettings

SAID = {
    "guard": "c065",
    "zone": "breach",
    "action": "stop",
    "reason": "misuse breach",
    "detectors": {"misuse": {"zone": "breach", "score": 9.5}},
    "coverage": {"scored": 40, "cached": 2, "missing": 1},
}

NOTE: Note = {"seconds": 0.5, "ended": [], "throttled": ["team-a"]}


@pytest.fixture
def guard(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> Path:
    guards.guard(tiny_loaded, guards.many_probes()[:2]).save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def receive(client: Any, *ids: str) -> list[str]:
    async def original() -> Any:
        return SimpleNamespace(outputs=[SimpleNamespace(request_id=name, kv_transfer_params=NOTE) for name in ids])

    return [one.request_id for one in asyncio.run(front_seams._received(original, client)).outputs]


def test_a_letter_is_taken_and_goes_no_further() -> None:
    taken: list[Any] = []
    client = SimpleNamespace(_spider_sense_front=SimpleNamespace(take=taken.append))
    assert receive(client, "a", "b") == ["a", "b"]
    assert not taken
    assert receive(client, "a", "spider_sense") == ["a"]
    assert receive(client, "spider_sense") == []
    assert taken == [NOTE] * 2
    assert receive(client) == []
    assert receive(SimpleNamespace(), "a", "spider_sense") == ["a"]


def traced(params: dict[str, Any] | None) -> dict[str, Any]:
    """Return the attributes of the span that vLLM would make of a request's last output."""
    spans: list[dict[str, Any]] = []

    def instrument(*, span_name: str, attributes: dict[str, Any]) -> None:
        assert span_name == "llm_request"
        spans.append(attributes)

    def trace(output: Any, state: str) -> None:
        assert state == "state"
        front_seams._spanned(instrument, span_name="llm_request", attributes={"own": 1})

    front_seams._traced(trace, None, SimpleNamespace(kv_transfer_params=params), "state")
    front_seams._spanned(instrument, span_name="llm_request", attributes={"of": "no request"})
    attributes, outside = spans
    assert outside == {"of": "no request"}
    return attributes


def test_a_span_carries_the_verdict_and_no_score() -> None:
    assert traced({"spider_sense": SAID}) == {
        "own": 1,
        "spider_sense.guard": "c065",
        "spider_sense.zone": "breach",
        "spider_sense.action": "stop",
        "spider_sense.coverage.scored": 40,
        "spider_sense.coverage.cached": 2,
        "spider_sense.coverage.missing": 1,
    }
    assert traced({"other": 1}) == traced(None) == {"own": 1}


def endpoint(settings: dict[str, Any] | None, *keys: str) -> tuple[list[str], list[Any]]:
    """Return the routes and the doors of a server with such settings, as vLLM has them attached."""
    routes: dict[str, Callable[[], Any]] = {}
    doors: list[Any] = []
    config = {} if settings is None else {"spider_sense": settings}
    args = SimpleNamespace(additional_config=config, api_key=list(keys) or None)
    app = SimpleNamespace(
        state=SimpleNamespace(args=args),
        get=lambda path: lambda run: routes.setdefault(path, run),
        add_middleware=lambda door, **options: doors.append(door(None, **options)),
        add_route=lambda path, run, **_: routes.setdefault(path, run),
    )
    own, ours = front_seams._endpoints(lambda tasks: ["own"], ("generate",))
    assert own == "own"
    ours.attach_router(app)
    return list(routes), doors


def test_the_endpoint_is_there_if_a_guard_is_named(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIDER_SENSE_GUARD", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert endpoint(None) == ([], [])
    assert endpoint({"guard": str(guard)}) == (["/v1/guard"], [])
    monkeypatch.setenv("SPIDER_SENSE_RELOAD_KEY", "0123456789abcdef")
    assert endpoint({"guard": str(guard)}) == (["/v1/guard", "/spider_sense/reload"], [])
    assert endpoint(None) == ([], [])
    assert front_seams._endpoints(lambda tasks: ["own"], ("embed",)) == ["own"]


def test_a_key_that_clients_have_is_no_key_to_the_guard(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIDER_SENSE_RELOAD_KEY", "0123456789abcdef")
    monkeypatch.setenv("VLLM_API_KEY", "0123456789abcdef")
    for keys in ((), ("another", "0123456789abcdef")):
        with pytest.raises(ConfigError, match="SPIDER_SENSE_RELOAD_KEY is one of the server's API keys") as error:
            endpoint({"guard": str(guard)}, *keys)
        assert "0123456789abcdef" not in str(error.value)
    # vLLM does not read the variable where the option is given.
    assert "/spider_sense/reload" in endpoint({"guard": str(guard)}, "another")[0]


def test_a_door_is_there_if_there_is_something_that_tells_principals_apart(
    guard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-the-environment")
    bearer = [(b"authorization", b"Bearer from-the-environment")]
    ((by_key,), (by_other_key,), (by_header,)) = (
        endpoint({"guard": str(guard)})[1],
        endpoint({"guard": str(guard)}, "secret")[1],
        endpoint({"guard": str(guard), "principal_header": "X-Who"})[1],
    )
    assert by_key._principals.principal(bearer) not in ("unknown", "from-the-environment")
    assert by_other_key._principals.principal(bearer) == "unknown", "vLLM does not take it either"
    assert by_header._principals.principal([(b"x-who", b"a")]) == "a"
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ConfigError, match="exempt_principals need to know who"):
        endpoint({"guard": str(guard), "exempt_principals": ["a"]})


@pytest.mark.parametrize("throttle", [None, "some"])
def test_a_request_is_sent_under_the_name_that_came_in_at_the_door(throttle: str | None) -> None:
    async def original(request: Any) -> None:
        sent.append(request.sampling_params)

    async def send(client: Any, who: str | None) -> Any:
        params = SimpleNamespace(extra_args={"spider_sense_principal": "forged"})
        token = PRINCIPAL.set(who)
        await front_seams._named(original, client, SimpleNamespace(sampling_params=params))
        PRINCIPAL.reset(token)
        return params.extra_args

    sent: list[Any] = []
    client = SimpleNamespace(_spider_sense_front=SimpleNamespace(throttle=throttle))
    assert asyncio.run(send(client, "team-a")) == {"spider_sense_principal": "team-a"}
    if throttle is None:
        assert asyncio.run(send(client, None)) is None
    else:
        with pytest.raises(SpiderSenseError, match="nobody can be slowed"):
            asyncio.run(send(client, None))
        del sent[1:]
    # A pooling request has none, and an engine without a guard is left alone.
    asyncio.run(front_seams._named(original, client, SimpleNamespace(sampling_params=None)))
    assert asyncio.run(send(SimpleNamespace(), "team-a")) == {"spider_sense_principal": "forged"}
    assert len(sent) == 3 + (throttle is None)


def test_a_front_end_that_cannot_throttle_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = SimpleNamespace(VLLM_USE_RUST_FRONTEND=False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=envs))
    throttles = Policy(rules=(), on_missing="throttle")
    front_seams.check(throttles, SimpleNamespace(name="OPENAI_API_SERVER"), headless=True)
    front_seams.check(throttles, usage_context=SimpleNamespace(name="OPENAI_API_SERVER"))
    front_seams.check(Policy.default(), SimpleNamespace(name="LLM_CLASS"))
    for usage in (None, SimpleNamespace(name="LLM_CLASS")):
        with pytest.raises(ConfigError, match="start it with `vllm serve`"):
            front_seams.check(throttles, usage)
    envs.VLLM_USE_RUST_FRONTEND = True
    with pytest.raises(ConfigError, match="VLLM_USE_RUST_FRONTEND"):
        front_seams.check(Policy.default(), SimpleNamespace(name="OPENAI_API_SERVER"))
    envs.VLLM_USE_RUST_FRONTEND = False
    monkeypatch.setitem(sys.modules, "limits", None)
    with pytest.raises(MissingExtraError, match="limits"):
        front_seams.check(throttles, SimpleNamespace(name="OPENAI_API_SERVER"))


@pytest.mark.parametrize(("principal", "wants"), [("a", False), ("b", True), (None, True)])
def test_reasoning_is_left_out_for_as_long_as_it_is_to_be(principal: str | None, wants: bool) -> None:
    now = [0.0]
    hush = Hush(10, lambda: now[0])
    hush.add(["a"])
    request = SimpleNamespace()

    async def original(request: Any, raw: Any) -> Any:
        assert request.include_reasoning == request.tokens
        return request.include_reasoning, raw

    def ask(front: Any) -> Any:
        request.include_reasoning = request.tokens = True
        engine = SimpleNamespace(engine_core=SimpleNamespace(**({"_spider_sense_front": front} if front else {})))
        token = PRINCIPAL.set(principal)
        try:
            fields = {"include_reasoning": False, "tokens": False}
            serving = SimpleNamespace(engine_client=engine)
            return asyncio.run(front_seams._hushed(fields, original, serving, request, "raw"))
        finally:
            PRINCIPAL.reset(token)

    hushes = SimpleNamespace(hush=hush)
    assert ask(hushes) == (wants, "raw")
    assert ask(SimpleNamespace(hush=None)) == ask(None) == (True, "raw")
    now[0] = 9.0
    assert ask(hushes) == (wants, "raw")
    now[0] = 11.0
    assert ask(hushes) == (True, "raw")


def test_what_is_said_of_a_guard_is_what_lies_on_disk(guard: Path) -> None:
    whole, policy = Guard.from_pretrained(guard), Policy.shadow()
    said = about(
        whole,
        policy,
        ServingSettings(guard=guard, graph="x", scores=True, exempt_principals=("red-team",)),
        {"vllm": "0.32.0"},
    )
    assert (said["guard"]["name"], said["guard"]["digest"]) == ("guard", whole.digest)
    assert said["guard"]["model"]["base_model"] == whole.manifest.fingerprint.base_model
    assert said["guard"]["sites"] == sorted({str(site) for probe in whole.probes for site in probe.maps})
    for shown, detector in zip(said["guard"]["detectors"], whole.manifest.detectors, strict=True):
        assert shown["name"] == detector.name
        for bucket, known in zip(shown["thresholds"], detector.calibration.buckets, strict=True):
            assert bucket == {
                "max_tokens": known.max_tokens,
                "suspect": known.suspect.value,
                "breach": known.breach.value,
            }
    assert said["policy"]["on_missing"] == "observe"
    assert said["policy"]["digest"] == policy.digest != Policy.default().digest
    assert said["settings"]["scores"] is True
    assert not {"graph", "exempt_principals"} & set(said["settings"])
    assert said["versions"] == {"vllm": "0.32.0"}
