"""States: bytes, merging, and purity."""

from dataclasses import replace
from typing import Any

import numpy as np
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


def test_a_merge_counts_both(detector: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 80)
    one, other = _after(detector, events[:30]), _after(detector, events[30:])
    both, whole = one.merge(other).states, _after(detector, events).states
    assert one.merge(other).count == 80
    for name in ("first", "last", "count", "sketched"):
        np.testing.assert_array_equal(both[name], whole[name])
    np.testing.assert_array_equal(both["history"], whole["history"])
    np.testing.assert_allclose(both["probe"], whole["probe"], atol=1e-4)
    m = np.exp(one.states["bets"].astype(float)) + np.exp(other.states["bets"].astype(float))
    np.testing.assert_allclose(np.exp(both["bets"].astype(float)), m, rtol=1e-5)
    # The frozen baseline is the older one's, whichever is merged into which.
    np.testing.assert_array_equal(other.merge(one).states["frozen"], one.states["frozen"])


def test_merging_with_an_unseen_principal_changes_nothing_but_the_seed(
    detector: TieredDetector, tiny_streams: Any
) -> None:
    state = _after(detector, tiny_streams.stream("a", 1, 30, tenant="app"))
    assert state.merge(detector.open("b")).to_bytes() == state.to_bytes()
    assert detector.open("a").merge(state).to_bytes() == state.to_bytes()


def test_a_merge_keeps_the_type_that_was_declared(detector: TieredDetector, tiny_streams: Any) -> None:
    silent = _after(detector, tiny_streams.stream("a", 1, 10))
    later = [replace(event, time=event.time + 1e6) for event in tiny_streams.stream("a", 2, 10, tenant="app")]
    declared = _after(detector, later)
    assert silent.merge(declared).tenant == declared.merge(silent).tenant == "app"
