"""What of a guard names a compiled graph."""

from pathlib import Path
from typing import Any

import pytest

from spider_sense.models import LoadedModel
from spider_sense.serving import graph
from spider_sense.serving.graph import OP_VERSION, graph_of
from spider_sense.serving.settings import ServingSettings


def test_a_graph_that_was_compiled_without_the_watch_is_another_one(
    tiny_loaded: LoadedModel, guards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, _ = guards.watch()
    monkeypatch.setattr(graph, "read_artifact", lambda settings: settings.detector)
    monkeypatch.setattr(graph, "heads_of", lambda detector: watch.probes[: int(detector.name)])
    guard = guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0"),))

    def found(heads: int) -> str:
        (tmp_path / "extraction.yaml").write_text(f"{{detector: '{heads}', key: none, store: none}}")
        return graph_of(guard, ServingSettings(guard=tmp_path, extraction=tmp_path / "extraction.yaml"))

    bare = graph_of(guard, ServingSettings(guard=tmp_path))
    assert bare == f"{OP_VERSION}/one:resid.0*1"
    assert found(1) == f"{bare}/x.0:resid.1*1"
    assert found(2) == f"{bare}/x.0:resid.1*1/x.1:resid.1*1"


def test_the_policys_patch_and_its_strength_are_part_of_it(
    tiny_loaded: LoadedModel, tiny_patches: Any, guards: Any, tmp_path: Path
) -> None:
    guard = guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0"),))
    saved = tiny_patches.patch(tiny_loaded, alpha=0.75).save_pretrained(tmp_path / "patch")

    def found(patch: str) -> str:
        (tmp_path / "policy.yaml").write_text(f"rules: []\n{patch}")
        return graph_of(guard, ServingSettings(guard=tmp_path, policy=tmp_path / "policy.yaml"))

    bare = found("")
    assert found(f"patch: {{folder: {tmp_path / 'patch'}}}") == f"{bare}/patch:{saved.digest}*0.75"
    assert found(f"patch: {{folder: {tmp_path / 'patch'}, alpha: 2}}") == f"{bare}/patch:{saved.digest}*2.0"
