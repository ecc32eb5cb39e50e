import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spider_sense.cli.app import app
from spider_sense.errors import ConfigError, GuardError
from spider_sense.reporting import build_report
from spider_sense.reporting.assembly import prompt_examples


@pytest.fixture
def folder(tiny_run: Any, tmp_path: Path) -> Path:
    """A guard that may be changed."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "guard"))


def edit(folder: Path, path: tuple[str | int, ...], value: Any) -> None:
    file = folder / "guard.json"
    manifest = json.loads(file.read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(manifest))


def test_a_trained_guard_is_read_in_full(tiny_run: Any, folder: Path) -> None:
    made = build_report(folder, tiny_run.loaded, prompt_examples(["w1 w2 w33"]), "Mine.", 4)
    facts, manifest = made.detectors[0], tiny_run.trained.guard.manifest
    overall = manifest.detectors[0].evidence["overall"]
    assert [system.name for system in facts.systems][:2] == ["guard", "tfidf"]
    assert facts.systems[0].auroc == overall["guard"]["auroc"]
    assert (facts.n, facts.positives) == (overall["guard"]["n"], overall["guard"]["positives"])
    assert facts.systems[0].roc
    assert [point.chosen for point in facts.candidates].count(True) == 1
    assert len(facts.candidates) == len(manifest.training["sweep"]["misuse"])
    assert made.guard.digest == tiny_run.trained.guard.digest
    assert (made.origin, made.serving, made.guard.signed) == ("Mine.", "float32", False)
    assert made.conversations[0].label is None
    assert made.difference <= 1e-4
    (folder / "model.sig").write_text("{}")
    assert build_report(folder, tiny_run.loaded, prompt_examples(["w1"]), "Mine.", 1).guard.signed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("detectors", 0, "evidence", "overall", "guard", "n"), "<script>"),
        (("detectors", 0, "evidence", "overall", "roc"), {"guard": [["<b>", 1]]}),
        (("detectors", 0, "evidence", "overall"), {"guard": {"auroc": 0.5}}),
        (("training", "sweep"), [1]),
        (("training", "sweep", "misuse", 0, "tpr_at_1pct_fpr"), "much"),
    ],
)
def test_evidence_that_cannot_be_read_is_an_error(
    tiny_run: Any, folder: Path, path: tuple[str | int, ...], value: Any
) -> None:
    edit(folder, path, value)
    with pytest.raises(GuardError, match="train the guard again"):
        build_report(folder, tiny_run.loaded, prompt_examples(["w1"]), "Mine.", 1)


@pytest.fixture
def packaged(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the tiny model whatever is asked for, and register the verbs."""
    importlib.import_module("spider_sense.cli.commands")
    monkeypatch.setattr("spider_sense.models.load_model", lambda *args: tiny_run.loaded)


@pytest.mark.usefixtures("packaged")
def test_the_verb_writes_one_page(tiny_run: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"r{n}", "text": f"w{n}"}) + "\n" for n in range(9)))
    out = tmp_path / "page.html"
    shared = ["report", str(tiny_run.folder), "--model", "org/tiny", "--max-new-tokens", "2", "--out", str(out)]
    chosen = ["--prompt", "<script>w1", "--data", str(rows), "--limit", "3"]
    result = CliRunner().invoke(app, [*shared, *chosen], catch_exceptions=False)
    assert result.exit_code == 0
    page = out.read_text(encoding="utf-8")
    assert [name in page for name in ("prompt 1", ">r0", "r3 ", "r6 ", "r8 ")] == [True, False, True, True, False]
    assert "3 of 9 rows of rows.jsonl" in page
    assert "<script" not in page
    assert not list(tmp_path.glob(".page.html*"))


@pytest.mark.usefixtures("packaged")
def test_without_a_folder_for_the_page_nothing_is_run(tiny_run: Any, tmp_path: Path) -> None:
    out = tmp_path / "none" / "page.html"
    with pytest.raises(ConfigError, match="does not exist"):
        CliRunner().invoke(
            app, ["report", str(tiny_run.folder), "--model", "x", "--out", str(out)], catch_exceptions=False
        )
