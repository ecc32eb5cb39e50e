"""The guard on disk: bit for bit, whole or not at all, and only for the model that it was made for."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spider_sense import guard as module
from spider_sense.errors import GuardError, MismatchError
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.folders import sha256
from spider_sense.guard import MANIFEST, PROBES, VECTORS, Guard
from spider_sense.models import LoadedModel


@pytest.fixture
def made(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    """A guard with probes of many kinds and two vectors that are views of one tensor."""
    both = torch.randn(2, 32)
    guard: Guard = guards.guard(
        tiny_loaded, guards.many_probes(), vectors={"refusal@resid.0": both[0], "calm@resid.1": both[1]}
    )
    return guard


@pytest.fixture
def folder(made: Guard, tmp_path: Path) -> Path:
    made.save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def bits(guard: Guard) -> dict[str, Any]:
    """Return every number of a guard, by name."""
    numbers: dict[str, Any] = dict(guard.vectors)
    for probe in guard.probes:
        for site, item in probe.maps.items():
            for name in ("weight", "bias", "mlp_weight", "mlp_bias"):
                numbers[f"{probe.name} {site} {name}"] = getattr(item, name)
    return {name: value if value is None else (value.shape, value.numpy().tobytes()) for name, value in numbers.items()}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    (folder / MANIFEST).write_text(json.dumps(record))


def resign(folder: Path) -> None:
    """Make the manifest name the files that are there."""
    digests = {"probes_digest": sha256(folder / PROBES), "vectors_digest": sha256(folder / VECTORS)}
    edit(folder, lambda record: record.update(digests))


def test_a_guard_comes_back_bit_for_bit(made: Guard, folder: Path) -> None:
    back = Guard.from_pretrained(folder)
    assert bits(back) == bits(made)
    assert [replace(probe, maps={}) for probe in back.probes] == [replace(probe, maps={}) for probe in made.probes]
    digests = {name: getattr(back.manifest, name) for name in ("probes_digest", "vectors_digest")}
    assert back.manifest == made.manifest.model_copy(update=digests)
    back.save_pretrained(folder.with_name("again"))
    again = Guard.from_pretrained(folder.with_name("again"))
    assert (again.manifest, again.digest) == (back.manifest, back.digest)
    for file in (MANIFEST, PROBES, VECTORS):
        assert (folder / file).read_bytes() == (folder.with_name("again") / file).read_bytes()


def test_the_digest_tells_guards_apart(guards: Any, tiny_loaded: LoadedModel, tmp_path: Path) -> None:
    digests = set()
    for seed, breach in ((0, 1.0), (0, 2.0), (1, 1.0)):
        guard = guards.guard(
            tiny_loaded, [guards.probe("a", "mean", "resid.0", seed=seed)], guards.calibration(0.5, breach)
        )
        guard.save_pretrained(tmp_path / "guard")
        digests.add(Guard.from_pretrained(tmp_path / "guard").digest)
    assert len(digests) == 3


@pytest.mark.parametrize("file", [MANIFEST, PROBES])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(GuardError, match=f"{file} does not exist"):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("file", [MANIFEST, PROBES])
def test_what_may_not_be_read_is_named(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GuardError, match=f"{file} cannot be read: Permission denied"):
        Guard.from_pretrained(folder)


def test_a_name_that_no_folder_can_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="cannot be read: File name too long"):
        Guard.from_pretrained(tmp_path / ("x" * 300))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="nowhere"):
        Guard.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("file", [MANIFEST, PROBES, VECTORS])
@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_file_is_refused(folder: Path, file: str, keep: int) -> None:
    whole = (folder / file).read_bytes()
    # The manifest ends with a newline that it can do without.
    (folder / file).write_bytes(whole[: keep - 1 if keep < 0 else keep])
    with pytest.raises(GuardError, match=file):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_probes_are_refused_even_with_a_digest_that_fits(folder: Path, keep: int) -> None:
    (folder / PROBES).write_bytes((folder / PROBES).read_bytes()[:keep])
    resign(folder)
    with pytest.raises(GuardError, match="cannot be read"):
        Guard.from_pretrained(folder)


def test_exchanged_probes_are_refused(folder: Path) -> None:
    tensors = load_file(folder / PROBES)
    tensors["ema/resid.0/bias"] = tensors["ema/resid.0/bias"] + 1
    save_file(tensors, folder / PROBES)
    with pytest.raises(GuardError, match="truncated or was exchanged"):
        Guard.from_pretrained(folder)


def test_exchanged_or_foreign_vectors_are_refused(folder: Path) -> None:
    save_file({name: -value for name, value in load_file(folder / VECTORS).items()}, folder / VECTORS)
    with pytest.raises(GuardError, match="truncated or was exchanged"):
        Guard.from_pretrained(folder)
    edit(folder, lambda record: record.update(vectors_digest=None))
    with pytest.raises(GuardError, match="truncated or was exchanged"):
        Guard.from_pretrained(folder)
    (folder / VECTORS).unlink()
    assert Guard.from_pretrained(folder).vectors == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(detectors=[]),
        lambda record: record["detectors"][0].update(sites=[]),
        lambda record: record["detectors"][0].update(name="../attention"),
        lambda record: record.update(extra=1),
        lambda record: record.pop("template"),
        lambda record: record.update(probes_digest="0" * 64),
        lambda record: record["detectors"][0].update(sites=["resid.1"]),
        lambda record: record["detectors"][0].update(name="other"),
        lambda record: record["detectors"][0]["aggregator"].update(kind="mean", parts=1),
        lambda record: record["detectors"][0]["aggregator"].update(parts="2"),
        lambda record: record["detectors"][0]["calibration"].update(buckets=[]),
        lambda record: record["detectors"][1]["calibration"]["buckets"][0]["breach"].update(value=float("nan")),
        lambda record: record.update(schema_version=2),
    ],
)
def test_an_edited_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(folder, change)
    with pytest.raises(GuardError):
        Guard.from_pretrained(folder)


def test_another_schema_version_is_named(folder: Path) -> None:
    edit(folder, lambda record: record.update(schema_version=7))
    with pytest.raises(GuardError, match="schema version 7, this library reads 1"):
        Guard.from_pretrained(folder)


def test_a_manifest_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(GuardError, match=r"guard\.json"):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("file", [PROBES, VECTORS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(folder: Path, file: str, bad: float) -> None:
    tensors = load_file(folder / file)
    name = sorted(tensors)[-1]
    tensors[name][-1] = bad
    save_file(tensors, folder / file)
    resign(folder)
    with pytest.raises(GuardError, match="not finite"):
        Guard.from_pretrained(folder)


def test_whoever_may_read_the_manifest_may_read_the_tensors(folder: Path) -> None:
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(list(folder.iterdir())) > 1
    assert modes == {(folder / "guard.json").stat().st_mode}


@pytest.mark.parametrize("step", ["save_file", "sha256", "rename"])
def test_a_save_that_fails_leaves_the_old_guard(
    made: Guard, guards: Any, tiny_loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    new = guards.guard(tiny_loaded, [guards.probe("new", "mean", "resid.0")])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    if step == "rename":
        rename = Path.rename
        # Only the last of the two renames fails.
        monkeypatch.setattr(
            Path, "rename", lambda old, to: fail() if to == folder and "old" not in old.name else rename(old, to)
        )
    else:
        monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="disk full"):
        new.save_pretrained(folder)
    monkeypatch.undo()
    assert bits(Guard.from_pretrained(folder)) == bits(made)
    assert [path.name for path in folder.parent.iterdir()] == ["guard"]


def test_a_guard_takes_the_place_of_another(guards: Any, tiny_loaded: LoadedModel, folder: Path) -> None:
    (folder / module.BASELINES / "tfidf").mkdir(parents=True)
    (folder / module.BASELINES / "tfidf" / "model.json").write_text("{}")
    new = guards.guard(tiny_loaded, [guards.probe("new", "mean", "resid.0")])
    new.save_pretrained(folder)
    back = Guard.from_pretrained(folder)
    assert bits(back) == bits(new)
    assert back.vectors == {}
    assert (folder / module.BASELINES / "tfidf" / "model.json").read_text() == "{}"
    assert [path.name for path in folder.parent.iterdir()] == ["guard"]


def test_a_guard_may_be_read_by_whoever_the_umask_allows(made: Guard, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        made.save_pretrained(tmp_path / "deep" / "guard")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "guard").stat().st_mode) == 0o755


def test_the_guard_knows_its_model(made: Guard, tiny_loaded: LoadedModel, tiny_model: Callable[[str], Any]) -> None:
    serving = serving_config(tiny_loaded.model)
    made.check_model(fingerprint(tiny_loaded), serving)
    other = fingerprint(replace(tiny_loaded, model=tiny_model("qwen2")))
    with pytest.raises(MismatchError, match=r"model_type is 'qwen2', expected 'llama'"):
        made.check_model(other, serving)
    with pytest.raises(MismatchError, match="model_type"):
        made.check_model(other, serving, allow_uncertified=True)


def test_a_fine_tune_is_another_model(made: Guard, tiny_loaded: LoadedModel) -> None:
    with torch.no_grad():
        tiny_loaded.model.lm_head.weight.mul_(1.5)
    with pytest.raises(MismatchError, match="weight_digest"):
        made.check_model(fingerprint(tiny_loaded), serving_config(tiny_loaded.model))


def test_another_tokenizer_or_template_is_refused(made: Guard, tiny_loaded: LoadedModel) -> None:
    serving = serving_config(tiny_loaded.model)
    tiny_loaded.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(MismatchError, match="chat_template_digest"):
        made.check_model(fingerprint(tiny_loaded), serving)
    tiny_loaded.tokenizer.add_tokens(["extra"])
    for allow in (False, True):
        with pytest.raises(MismatchError, match="tokenizer_digest"):
            made.check_model(fingerprint(tiny_loaded), serving, allow)


def test_an_uncertified_dtype_must_be_allowed(made: Guard, tiny_loaded: LoadedModel) -> None:
    model = tiny_loaded.model.to(torch.float16)
    found, serving = fingerprint(replace(tiny_loaded, model=model)), serving_config(model)
    with pytest.raises(MismatchError, match=r'"dtype":"float16".*"dtype":"float32".*allow_uncertified'):
        made.check_model(found, serving)
    made.check_model(found, serving, allow_uncertified=True)
    with pytest.raises(MismatchError, match="width"):
        made.check_model(found.model_copy(update={"width": 8}), serving, allow_uncertified=True)
