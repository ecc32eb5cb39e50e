"""Another guard for an engine that runs: which is taken from its folder, and which is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spider_sense.fingerprint import serving_config
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.serving.exchange import exchange
from spider_sense.serving.graph import OP_VERSION, graph_of
from spider_sense.serving.settings import ServingSettings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "resid.1"}, "probes {op}/one:resid.0*1, the guard has {op}/one:resid.1*1"),
        ({"kind": "attention"}, "probes {op}/one:resid.0*1, the guard has {op}/one:resid.0*2"),
        ({"template": True}, "made for the template"),
        ({"serving": True}, "uncertified serving configuration"),
        ({"policy": "on_missing: steer\nsteer: {vector: calm, strength: 1}"}, "the vLLM engine cannot 'steer'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_guard_that_does_not_fit_is_refused_and_the_old_one_stays(
    tiny_loaded: LoadedModel, guards: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    first = guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=1),))
    engine = guards.Engine(tiny_loaded, first, guards)
    probe = guards.probe("one", change.get("kind", "mean"), change.get("site", "resid.0"), seed=2)
    other = guards.guard(tiny_loaded, (probe,))
    if "template" in change:
        template = other.manifest.template.model_copy(update={"tail": 3})
        other = replace(other, manifest=other.manifest.model_copy(update={"template": template}))
    other.save_pretrained(tmp_path / "other")
    told = {"guard": str(tmp_path / "other"), "graph": graph_of(first, ServingSettings(guard=tmp_path))}
    if "policy" in change:
        (tmp_path / "policy.yaml").write_text(f"rules: []\n{change['policy']}\n")
        told["policy"] = str(tmp_path / "policy.yaml")
    serving = serving_config(tiny_loaded.model)
    if "serving" in change:
        serving = serving.model_copy(update={"dtype": "bfloat16"})
    refused = exchange(engine.guard, told, serving)
    assert refused is not None
    assert message.format(op=OP_VERSION) in refused
    assert engine.guard.judge.guard is first
    engine.add("a", [1, 5, *range(10, 20)], [20])
    engine.step({"a": 100})
    engine.check("a", guards)


def test_a_policy_whose_patch_begins_elsewhere_is_taken(
    tiny_loaded: LoadedModel, tiny_patches: Any, guards: Any, tmp_path: Path
) -> None:
    which = guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=1),))
    engine = guards.Engine(tiny_loaded, which, guards)
    which.save_pretrained(tmp_path / "guard")
    tiny_patches.patch(tiny_loaded).save_pretrained(tmp_path / "patch")
    policy = tmp_path / "policy.yaml"
    settings = ServingSettings(guard=tmp_path / "guard", policy=policy)
    for begin in ("token", "prompt", "token"):
        policy.write_text(f"rules: []\non_missing: patch\npatch: {{folder: {tmp_path / 'patch'}, begin: {begin}}}\n")
        told = settings.model_copy(update={"graph": graph_of(which, settings)}).model_dump(mode="json")
        assert exchange(engine.guard, told, serving_config(tiny_loaded.model)) is None
        assert engine.guard.judge.policy.patch.begin == begin


def test_a_guard_that_fits_is_taken_from_its_folder(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> None:
    first, second = (guards.guard(tiny_loaded, (guards.probe("one", "mean", "resid.0", seed=seed),)) for seed in (1, 2))
    engine = guards.Engine(tiny_loaded, first, guards)
    second.save_pretrained(tmp_path / "second")
    told = {"guard": str(tmp_path / "second"), "graph": graph_of(first, ServingSettings(guard=tmp_path))}
    assert exchange(engine.guard, told, serving_config(tiny_loaded.model)) is None
    assert engine.guard.judge.guard.digest == Guard.from_pretrained(tmp_path / "second").digest
