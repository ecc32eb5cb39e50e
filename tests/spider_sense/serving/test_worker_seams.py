"""What of the seams runs without vLLM."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import MismatchError, SpiderSenseError
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.worker_seams import _executed, _loaded, _measured, _shut_down


def test_a_dummy_step_is_none_of_the_guards(tiny_loaded: LoadedModel, guards: Any) -> None:
    # An idle data-parallel rank computes one whenever another rank has work; its requests do not exist.
    judge = Judge(guards.guard(tiny_loaded, guards.many_probes()[:1]), Policy.default())
    runner = SimpleNamespace(_spider_sense_guard=EngineGuard(judge))
    seen: list[Any] = []
    step = SimpleNamespace(total_num_scheduled_tokens=3)
    assert _executed(lambda _: ((), (), ()), lambda *args, **_: seen.append(args), runner, step, dummy_run=True) is None
    assert seen == [(step,)]
    assert not runner._spider_sense_guard.waiting


@pytest.mark.parametrize(
    ("graph", "error"), [(None, SpiderSenseError), ("1/another:resid.1/patch:0*1.0", MismatchError)]
)
def test_a_worker_that_would_compile_what_the_server_did_not_check_is_refused(
    graph: str | None, error: type[Exception], tiny_loaded: LoadedModel, guards: Any, tmp_path: Path
) -> None:
    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    settings = {"guard": str(tmp_path / "guard"), "graph": graph}
    worker = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"spider_sense": settings}))
    says = "without the plugin" if graph is None else "/attention:.* where the server found 1/another"
    with pytest.raises(error, match=says):
        _loaded(lambda: None, worker)


class Full:
    page_size_bytes = 1000


class Sliding:
    page_size_bytes = 500


@pytest.mark.parametrize(
    ("specs", "most"),
    [([Full()] * 6, 1_000_000 // 6000), ([Full()] * 2 + [Sliding()] * 4, 1_000_000 // 1000)],
    ids=["layers of one kind", "layers of two kinds"],
)
def test_the_states_of_all_blocks_fit_beside_the_kv_cache(
    specs: list[Any], most: int, tiny_loaded: LoadedModel, guards: Any
) -> None:
    guard = EngineGuard(Judge(guards.guard(tiny_loaded, guards.many_probes()), Policy.default()))
    cache = SimpleNamespace(enable_prefix_caching=True)
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(_spider_sense_guard=guard),
        vllm_config=SimpleNamespace(cache_config=cache),
        get_kv_cache_spec=lambda: dict(enumerate(specs)),
    )
    left = _measured(lambda: 1_000_000, worker)
    block = 1_000_000 // most
    blocks = left // block
    guard.kv_states.keep(16, blocks)
    states = guard.judge.scorer.blocks
    assert states is not None
    taken = sum(part.nbytes for part in states.tables)
    assert blocks * block + taken <= 1_000_000 < (blocks + 2) * (block + guard.kv_states.block_bytes)
    cache.enable_prefix_caching = False
    assert _measured(lambda: 1_000_000, worker) == 1_000_000
    worker.model_runner = SimpleNamespace()
    assert _measured(lambda: 1_000_000, worker) == 1_000_000


def test_requests_that_run_at_a_shutdown_are_closed_and_the_rest_is_shut_down_anyway(
    tiny_loaded: LoadedModel, guards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = EngineGuard(Judge(guards.guard(tiny_loaded, guards.many_probes()[:1]), Policy.default()))
    done: list[str] = []
    worker = SimpleNamespace(model_runner=SimpleNamespace(_spider_sense_guard=guard))
    monkeypatch.setattr(guard, "close", lambda: done.append("guard"))
    _shut_down(lambda: done.append("worker"), worker)
    assert done == ["guard", "worker"]

    def fail() -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(guard, "close", fail)
    with pytest.raises(OSError, match="disk"):
        _shut_down(lambda: done.append("worker"), worker)
    # A worker that never came to its model, and one without a guard.
    for other in (SimpleNamespace(), SimpleNamespace(model_runner=SimpleNamespace())):
        _shut_down(lambda: done.append("worker"), other)
    assert done == ["guard", "worker", "worker", "worker", "worker"]
