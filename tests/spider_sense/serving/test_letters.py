"""What an engine tells the processes that answer clients reaches those that it concerns."""

import sys
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.extraction.feed_counts import FeedNote
from spider_sense.serving import letters


@pytest.fixture(autouse=True)
def _outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of vLLM's as is touched."""

    def several(outputs: list[Any] | None = None) -> Any:
        return SimpleNamespace(outputs=outputs or [])

    what = SimpleNamespace(EngineCoreOutput=SimpleNamespace, EngineCoreOutputs=several)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", what)


def test_every_process_hears_who_is_slowed_and_one_counts() -> None:
    for throttled, reached in ((["a"], [0, 1, 2]), ([], [1])):
        sent: dict[int, Any] = {1: SimpleNamespace(outputs=[])}
        letters.send(3, sent, {"seconds": 0.5, "ended": [], "throttled": throttled})
        notes = {client: one.kv_transfer_params for client in sent for one in sent[client].outputs}
        assert sorted(notes) == reached
        assert all(note["throttled"] == throttled for note in notes.values())
        assert [notes[client]["seconds"] for client in reached] == [0.5 * (client == 1) for client in reached]


def test_every_process_hears_who_is_hushed_and_one_what_is_counted() -> None:
    sent: dict[int, Any] = {1: SimpleNamespace(outputs=[])}
    told: FeedNote = {
        "requests": {"folded": 2},
        "decisions": [("limit", "own")],
        "store_errors": 0,
        "seconds": [0.1],
        "waiting": 0,
    }
    letters.send(2, sent, {"seconds": 0.5, "ended": [], "throttled": [], "hushed": ["a"], "extraction": told})
    notes = {client: one.kv_transfer_params for client in sent for one in sent[client].outputs}
    assert [notes[client]["hushed"] for client in (0, 1)] == [["a"], ["a"]]
    assert [notes[client].get("extraction") for client in (0, 1)] == [None, told]


def test_every_process_hears_what_is_in_force_from_now_on() -> None:
    queue: Queue[tuple[int, Any]] = Queue()
    parallel = SimpleNamespace(_api_process_count=2)
    core = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel), output_queue=queue)
    letters.announce(core, {"guard": "g"})
    for client in range(2):
        found, outputs = queue.get_nowait()
        assert found == client
        assert letters.opened(outputs) == {"in_force": {"guard": "g"}}
        assert outputs.outputs == []
    assert queue.empty()


def test_what_a_request_says_is_no_letter() -> None:
    for name, told in (("spider_sense", None), ("spider_sense-1", {"in_force": {}}), ("a", {"spider_sense": {}})):
        received = SimpleNamespace(outputs=[SimpleNamespace(request_id=name, kv_transfer_params=told)])
        assert letters.opened(received) is None
        assert len(received.outputs) == 1
