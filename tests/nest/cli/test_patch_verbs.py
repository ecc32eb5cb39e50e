"""``nest apply``, ``revert``, ``merge``, ``diff``, ``export``: what they print, and that bad input writes nothing."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nest.cli import main
from spider_sense.models import LoadedModel, load_model
from spider_sense.patch import NeuronPatch
from spider_sense.types import Site

Run = Callable[..., str]


@pytest.fixture
def base(tiny_loaded: LoadedModel, tmp_path: Path) -> LoadedModel:
    """A model that was loaded from a folder."""
    tiny_loaded.model.save_pretrained(tmp_path / "base")
    tiny_loaded.tokenizer.save_pretrained(tmp_path / "base")
    return load_model(str(tmp_path / "base"))


@pytest.fixture
def patch(base: LoadedModel, tiny_patches: Any, tmp_path: Path) -> NeuronPatch:
    built: NeuronPatch = tiny_patches.patch(base)
    return built.save_pretrained(tmp_path / "patch")


@pytest.fixture
def run(patch: NeuronPatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed, and return what it printed; the patch is there."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["nest", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown
        assert shown.err == ""
        return shown.out

    return run


@pytest.fixture
def refuse(
    patch: NeuronPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command that must fail, and return its error; nothing may have been written."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["nest", *map(str, arguments)])
        capsys.readouterr()
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert contents(tmp_path) == before
        assert ended.value.code == 2, shown
        assert shown.err.startswith("error: "), shown
        assert "Traceback" not in shown.err
        return shown.err

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def on_base(verb: str, tmp_path: Path, *more: object, patch: str = "patch", out: str = "out") -> tuple[object, ...]:
    """Return the arguments of a verb that writes."""
    return verb, "--model", tmp_path / "base", "--patch", tmp_path / patch, "--out", tmp_path / out, *more


WRITERS = ("apply", "merge", "export")


def test_apply_and_revert(run: Run, patch: NeuronPatch, tmp_path: Path) -> None:
    out = run(*on_base("apply", tmp_path, "--alpha", "0.5"))
    assert out.startswith(
        f"wrote {tmp_path}/out: patch {patch.digest} at alpha 0.5 in 24 rows of 4 projections, float32"
    )
    out = run("revert", tmp_path / "out", "--out", tmp_path / "back")
    assert f"wrote {tmp_path}/back without patch {patch.digest}: all weights are bit for bit those of" in out
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "back"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_apply_in_another_dtype(run: Run, tmp_path: Path) -> None:
    assert "bfloat16" in run(*on_base("apply", tmp_path, "--dtype", "bfloat16"))
    run("revert", tmp_path / "out", "--out", tmp_path / "back")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "back"))
    assert all(torch.equal(value.bfloat16(), other[name]) for name, value in one.items())


def test_merge(run: Run, base: LoadedModel, patch: NeuronPatch, tiny_patches: Any, tmp_path: Path) -> None:
    second = tiny_patches.patch(base, patch.targets, seed=1, alpha=2.0).save_pretrained(tmp_path / "second")
    assert "in 24 rows" in run(*on_base("merge", tmp_path))
    out = run(*on_base("merge", tmp_path, "--patch", tmp_path / "second"))
    assert f"{patch.digest} at alpha 1, {second.digest} at alpha 2, in 24 rows; `nest revert` cannot" in out
    assert "24 rows are in more than one patch and got the sum of their deltas" in out


def test_export(run: Run, patch: NeuronPatch, tmp_path: Path) -> None:
    out = run(*on_base("export", tmp_path))
    assert out == f"wrote {tmp_path}/out: patch {patch.digest} at alpha 1 as a LoRA of rank 3 on 4 modules\n"


def test_diff_of_patches(run: Run, base: LoadedModel, tiny_patches: Any, tmp_path: Path) -> None:
    tiny_patches.patch(base, seed=1).save_pretrained(tmp_path / "second")
    shown = run("diff", tmp_path / "patch", tmp_path / "second")
    assert "gate.0" in shown
    assert "of one base; rows shared" in shown
    found = json.loads(run("diff", tmp_path / "patch", tmp_path / "second", "--json"))
    assert {item["shared"] + item["only_a"] for item in found["sites"]} == {6}


def test_diff_of_models(run: Run, tmp_path: Path) -> None:
    run(*on_base("apply", tmp_path))
    shown = run("diff", tmp_path / "base", tmp_path / "out")
    assert "24 rows in 4 projections differ; what else differs: nothing" in shown
    found = json.loads(run("diff", tmp_path / "base", tmp_path / "out", "--json"))
    assert [len(item["rows"]) for item in found["projections"]] == [6] * 4


def test_diff_of_equal_models(run: Run, tmp_path: Path) -> None:
    shown = run("diff", tmp_path / "base", tmp_path / "base")
    assert shown == "0 rows in 0 projections differ; what else differs: nothing\n"


def test_diff_of_models_tells_of_two_dtypes(run: Run, tmp_path: Path) -> None:
    run(*on_base("apply", tmp_path, "--dtype", "bfloat16"))
    assert "a is float32, b bfloat16: rounding alone makes rows differ" in run(
        "diff", tmp_path / "base", tmp_path / "out"
    )


@pytest.mark.parametrize("verb", WRITERS)
def test_missing_patch(refuse: Run, tmp_path: Path, verb: str) -> None:
    error = refuse(*on_base(verb, tmp_path, patch="none"))
    assert "none/patch.json does not exist; name a folder that `nest tune` wrote" in error


@pytest.mark.parametrize("verb", WRITERS)
def test_truncated_patch(refuse: Run, tmp_path: Path, verb: str) -> None:
    tensors = tmp_path / "patch" / "patch.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    assert "the file is truncated or was exchanged; tune or copy the patch again" in refuse(*on_base(verb, tmp_path))


@pytest.mark.parametrize("verb", WRITERS)
def test_missing_model(refuse: Run, tmp_path: Path, verb: str) -> None:
    error = refuse(verb, "--model", tmp_path / "none", "--patch", tmp_path / "patch", "--out", tmp_path / "out")
    assert f"no such folder: {tmp_path}/none" in error


@pytest.mark.parametrize("verb", WRITERS)
def test_patch_of_another_model(refuse: Run, tmp_path: Path, verb: str) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2}, weights, metadata={"format": "pt"})
    error = refuse(*on_base(verb, tmp_path))
    assert "weight_digest is '" in error
    assert "', expected '" in error


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [
        ([3], 31, "vectors for gate.1 have 31 numbers, the projection has 32 inputs"),
        ([48], 32, "changes row 48 of gate.1, which has rows 0 to 47"),
    ],
)
def test_patch_of_another_shape(
    refuse: Run,
    base: LoadedModel,
    tiny_patches: Any,
    tmp_path: Path,
    verb: str,
    rows: list[int],
    width: int,
    expected: str,
) -> None:
    from spider_sense.types import Site

    bad = {Site(1, "gate"): tiny_patches.target(rows, width=width)}
    tiny_patches.patch(base, bad).save_pretrained(tmp_path / "bad")
    assert expected in refuse(*on_base(verb, tmp_path, patch="bad"))


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("alpha", ["nan", "inf"])
def test_strength_that_is_no_number(refuse: Run, tmp_path: Path, verb: str, alpha: str) -> None:
    assert f"the strength alpha is {alpha}; give a finite number" in refuse(*on_base(verb, tmp_path, "--alpha", alpha))


@pytest.mark.parametrize("verb", ["apply", "merge"])
def test_unknown_dtype(refuse: Run, tmp_path: Path, verb: str) -> None:
    assert "unknown dtype 'int8'" in refuse(*on_base(verb, tmp_path, "--dtype", "int8"))


@pytest.mark.parametrize(
    ("verb", "noun"), [("apply", "patched model"), ("merge", "merged model"), ("export", "exported adapter")]
)
@pytest.mark.parametrize("out", ["base", "patch", "base/config.json"])
def test_output_that_is_something_else(refuse: Run, tmp_path: Path, verb: str, noun: str, out: str) -> None:
    error = refuse(*on_base(verb, tmp_path, out=out))
    assert f"{out} exists and is no {noun}, so it is not replaced; name a new folder" in error


@pytest.mark.parametrize("verb", WRITERS)
def test_output_below_a_file(refuse: Run, tmp_path: Path, verb: str) -> None:
    error = refuse(*on_base(verb, tmp_path, out="base/config.json/out"))
    assert "cannot write into" in error
    assert "base/config.json is a file; name another folder" in error


@pytest.mark.parametrize("verb", ["apply", "merge"])
def test_patched_model_is_not_patched_again(
    run: Run, refuse: Run, patch: NeuronPatch, base: LoadedModel, tiny_patches: Any, tmp_path: Path, verb: str
) -> None:
    run(*on_base("apply", tmp_path, out="patched"))
    second = tiny_patches.patch(base, seed=1).save_pretrained(tmp_path / "second")
    for folder, digest in (("patch", patch.digest), ("second", second.digest)):
        arguments = ("--model", tmp_path / "patched", "--patch", tmp_path / folder, "--out", tmp_path / "out")
        assert f"patch {digest} cannot be applied: patch {patch.digest} is in" in refuse(verb, *arguments)


def test_patch_that_is_merged_twice(refuse: Run, patch: NeuronPatch, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "patch", tmp_path / "copy")
    error = refuse(*on_base("merge", tmp_path, "--patch", tmp_path / "copy"))
    assert f"patch {patch.digest} is given 2 times among" in error


def test_revert_of_a_plain_model(refuse: Run, tmp_path: Path) -> None:
    error = refuse("revert", tmp_path / "base", "--out", tmp_path / "back")
    assert "base/spider_sense_patch/applied.json does not exist; name a folder that `nest apply` wrote" in error


def test_revert_of_a_model_that_was_changed(run: Run, refuse: Run, tmp_path: Path) -> None:
    run(*on_base("apply", tmp_path))
    weights = tmp_path / "out" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert "was changed after patch" in refuse("revert", tmp_path / "out", "--out", tmp_path / "back")


def test_revert_into_something_else(run: Run, refuse: Run, tmp_path: Path) -> None:
    run(*on_base("apply", tmp_path))
    error = refuse("revert", tmp_path / "out", "--out", tmp_path / "base")
    assert "base exists and is no patched model, so it is not replaced" in error
    assert "cannot write" in refuse("revert", tmp_path / "out", "--out", tmp_path / "base" / "config.json" / "x")


def test_revert_with_damaged_originals(run: Run, refuse: Run, tmp_path: Path) -> None:
    run(*on_base("apply", tmp_path))
    originals = tmp_path / "out" / "spider_sense_patch" / "originals.safetensors"
    originals.write_bytes(b"x" + originals.read_bytes())
    assert "the file is truncated or was exchanged" in refuse("revert", tmp_path / "out", "--out", tmp_path / "back")
    originals.unlink()
    assert "originals.safetensors does not exist" in refuse("revert", tmp_path / "out", "--out", tmp_path / "back")


def test_diff_of_a_patch_and_a_model(refuse: Run, tmp_path: Path) -> None:
    error = refuse("diff", tmp_path / "patch", tmp_path / "base")
    assert "patch is a patch and" in error
    assert "base is none; compare two patches or two models" in error


def test_diff_of_two_architectures(refuse: Run, tiny_model: Any, base: LoadedModel, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    base.tokenizer.save_pretrained(tmp_path / "gpt2")
    error = refuse("diff", tmp_path / "base", tmp_path / "gpt2")
    assert "the architecture is LlamaForCausalLM in" in error
    assert "and GPT2LMHeadModel in" in error


def test_diff_of_something_that_does_not_exist(refuse: Run, tmp_path: Path) -> None:
    assert f"no such folder: {tmp_path}/none" in refuse("diff", tmp_path / "none", tmp_path / "base")


def test_a_patch_of_experts_is_not_exported_and_no_model_is_loaded(
    refuse: Run, base: LoadedModel, tiny_patches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tiny_patches.patch(base, {Site(0, "gate", 1): tiny_patches.target([1])})
    inside.save_pretrained(tmp_path / "inside")
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    error = refuse("export", "--model", tmp_path / "base", "--patch", tmp_path / "inside", "--out", tmp_path / "out")
    assert "changes gate.0.1, a projection inside an expert, which no module of an adapter stands for" in error
