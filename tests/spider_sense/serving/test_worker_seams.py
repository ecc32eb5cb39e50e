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
from spider_sense.serving.worker_seams import _executed, _loaded


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
    says = "without the plugin" if graph is None else "1/attention:.* where the server found 1/another"
    with pytest.raises(error, match=says):
        _loaded(lambda: None, worker)
