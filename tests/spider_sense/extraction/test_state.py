"""States: bytes and purity."""

from typing import Any

import pytest

from spider_sense.errors import StateError
from spider_sense.extraction import PrincipalState
from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.state import fresh
from spider_sense.extraction.tiers import TieredDetector


def _after(detector: TieredDetector, events: Any) -> PrincipalState:
    state = detector.open(events[0].principal)
    for event in events:
        state, _ = detector.update(state, event)
    return state


def test_bytes_come_back_bit_by_bit_and_are_few(detector: TieredDetector, tiny_streams: Any) -> None:
    state = _after(detector, tiny_streams.stream("a", 1, 90, attack_from=60, tenant="app"))
    data = state.to_bytes()
    assert len(data) == PrincipalState.SIZE <= 16 * 1024
    back = PrincipalState.from_bytes(data)
    assert back.to_bytes() == data
    assert (back.count, back.tenant, back.first, back.last) == (90, "app", 1e9, 1e9 + 60.0 * 89)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "no principal's state"),
        (lambda data: b"{}" + data[2:], "no principal's state"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "damaged"),
        (lambda data: data[:4] + b"\x63\x00" + data[6:], "layout 99"),
    ],
)
def test_bytes_that_are_no_state_are_refused(damage: Any, says: str) -> None:
    data = PrincipalState.open(5).to_bytes()
    with pytest.raises(StateError, match=says):
        PrincipalState.from_bytes(damage(data))


def test_an_update_changes_nothing_that_was_given(detector: TieredDetector, tiny_streams: Any) -> None:
    first, second = tiny_streams.stream("a", 1, 2)
    before, _ = detector.update(detector.open("a"), first)
    data = before.to_bytes()
    one, _ = detector.update(before, second)
    assert before.to_bytes() == data
    again, _ = detector.update(PrincipalState.from_bytes(data), second)
    assert again.to_bytes() == one.to_bytes()


def test_many_principals_together_are_each_alone(detector: TieredDetector, tiny_streams: Any) -> None:
    streams = [tiny_streams.stream(name, seed, 40) for seed, name in enumerate("abc")]
    states = fresh([tiny_streams.KEY.seed(name) for name in "abc"])
    for events in zip(*streams, strict=True):
        states, _ = detector.step(states, EventBatch.of(events), list("abc"))
    for row, stream in enumerate(streams):
        assert states[row].tobytes() == _after(detector, stream).states[0].tobytes()
