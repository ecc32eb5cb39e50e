"""The front end: notes are taken off and counted, spans carry the verdict, the endpoint is there if a guard is."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.serving import front_seams
from spider_sense.serving.about import about
from spider_sense.serving.settings import ServingSettings

SAID = {
    "guard": "c065",
    "zone": "breach",
    "action": "stop",
    "reason": "misuse breach",
    "detectors": {"misuse": {"zone": "breach", "score": 9.5}},
    "coverage": {"scored": 40, "cached": 2, "missing": 1},
}


@pytest.fixture
def guard(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> Path:
    guards.guard(tiny_loaded, guards.many_probes()[:2]).save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def receive(client: Any, *ids: str) -> list[str]:
    async def original() -> Any:
        return SimpleNamespace(outputs=[SimpleNamespace(request_id=name, kv_transfer_params={"n": 1}) for name in ids])

    return [one.request_id for one in asyncio.run(front_seams._received(original, client)).outputs]


def test_a_note_is_counted_and_goes_no_further() -> None:
    counted: list[Any] = []
    client = SimpleNamespace(_spider_sense_metrics=SimpleNamespace(count=counted.append))
    assert receive(client, "a", "b") == ["a", "b"]
    assert not counted
    assert receive(client, "a", "spider_sense") == ["a"]
    assert receive(client, "spider_sense") == []
    assert counted == [{"n": 1}, {"n": 1}]
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


def endpoint(settings: dict[str, Any] | None) -> dict[str, Callable[[], Any]]:
    """Return the routes of a server with such settings, as vLLM has them attached."""
    routes: dict[str, Callable[[], Any]] = {}
    config = {} if settings is None else {"spider_sense": settings}
    args = SimpleNamespace(additional_config=config)
    app = SimpleNamespace(state=SimpleNamespace(args=args), get=lambda path: lambda run: routes.setdefault(path, run))
    own, ours = front_seams._endpoints(lambda tasks: ["own"], ("generate",))
    assert own == "own"
    ours.attach_router(app)
    return routes


def test_the_endpoint_is_there_if_a_guard_is_named(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIDER_SENSE_GUARD", raising=False)
    assert not endpoint(None)
    assert list(endpoint({"guard": str(guard)})) == ["/v1/guard"]
    assert front_seams._endpoints(lambda tasks: ["own"], ("embed",)) == ["own"]


def test_what_is_said_of_a_guard_is_what_lies_on_disk(guard: Path) -> None:
    whole, policy = Guard.from_pretrained(guard), Policy.shadow()
    said = about(whole, policy, ServingSettings(guard=guard, graph="x", scores=True), {"vllm": "0.32.0"})
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
    assert "graph" not in said["settings"]
    assert said["versions"] == {"vllm": "0.32.0"}
