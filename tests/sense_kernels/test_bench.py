"""The benchmarks at tiny sizes: what they report, and that nothing is reported of variants that disagree."""

import argparse
import csv
import importlib.util
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "kernels" / "bench"
CPU = torch.device("cpu")


def load(name: str) -> Any:
    # The scripts are no package, and name each other as a script does: by the folder they lie in.
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a script by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    return load


@pytest.fixture
def score_fold(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script without its compiler, which takes half a minute."""
    module = scripts("bench_score_fold")
    dense = module.Dense
    monkeypatch.setitem(module.VARIANTS, "compiled", lambda bank, step: dense(bank, step, lambda function: function))
    monkeypatch.setattr(module, "_MORE_ROUNDS", 1)
    return module


def tiny(module: Any, path: Path, *more: str) -> argparse.Namespace:
    sizes = "--decode", "2", "--prefill", "32", "--width", "48", "--heads", "8", "--sites", "2"
    arguments: argparse.Namespace = module.parse(
        ["--device", "cpu", "--rounds", "3", "--csv", str(path), *sizes, *more]
    )
    return arguments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_line_and_the_rows(score_fold: Any, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = score_fold.main(tiny(score_fold, tmp_path / "results.csv", "--dtype", dtype))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    expected = set(product(("decode", "decode_site", "prefill", "prefill8"), score_fold.VARIANTS))
    for case, variant in expected:
        assert line[f"{case}_{variant}_us"] > 0
        assert (f"{case}_{variant}_ratio" in line) == (variant != "ours")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["case"], row["variant"]) for row in rows) == sorted(expected)
    assert {row["T"] for row in rows} == {"2", "32"}
    assert {(row["D"], row["N"], row["dtype"]) for row in rows} == {("48", "8", dtype)}
    assert {row["torch"] for row in rows} == {torch.__version__}


def test_a_second_run_is_appended_under_the_same_header(scripts: Any, tmp_path: Path) -> None:
    module, path = scripts("_report"), tmp_path / "results.csv"
    for _ in range(2):
        report = module.Report("op", CPU, 3, path)
        report.add(module.Case("decode", 8, 576, 64, "float32", 1000), {"ours": [1.0, 2.0], "loop": [3.0, 4.0]})
        report.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    assert sum(line.startswith("op,") and "median_us" in line for line in lines) == 1


def test_a_ratio_is_the_baseline_over_ours_in_the_same_round(scripts: Any, tmp_path: Path) -> None:
    module = scripts("_report")
    report = module.Report("op", CPU, 3, tmp_path / "results.csv")
    times = {"ours": [10.0, 20.0, 40.0], "loop": [50.0, 40.0, 400.0]}
    report.add(module.Case("decode", 8, 576, 64, "float32", 4000), times)
    assert report.line["decode_loop_ratio"] == 5.0
    assert report.line["decode_ours_us"] == 20.0
    assert report.rows[0]["gb_per_s"] == 0.2


def test_rounds_go_forwards_and_backwards(scripts: Any) -> None:
    module, called = scripts("_bench"), []
    variants = {name: lambda name=name: called.append(name) for name in "ABC"}
    times = module.alternate(variants, 4, CPU)
    assert {name: len(taken) for name, taken in times.items()} == {"A": 4, "B": 4, "C": 4}
    # Every timed call follows one of its own; the rounds that warm up are called alike.
    assert called[::2] == called[1::2] == list("ABCCBA" * 3 + "ABC")


@pytest.mark.parametrize("requests", [4, 1])
@pytest.mark.parametrize("variant", ["eager", "compiled", "loop"])
def test_the_gate_stays_shut_for_other_numbers(score_fold: Any, variant: str, requests: int, tmp_path: Path) -> None:
    module = score_fold
    bank = module.random_bank(48, 8, 2, torch.float32, CPU)
    step = module.random_step(bank, 4, requests, torch.float32, CPU)
    made = {name: make(bank, step) for name, make in module.VARIANTS.items()}
    module.gate(made, step)

    class Off:
        state = made[variant].state

        def __call__(self) -> None:
            made[variant]()
            self.state = made[variant].state
            self.state.peak[0, 0] += 0.01

    with pytest.raises(AssertionError, match=f"{variant} does not agree in result 2"):
        module.gate(made | {variant: Off()}, step)


def test_nothing_is_written_on_a_red_gate(
    score_fold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def skewed(*arguments: Any) -> Any:
        bank, step = arguments
        twin = score_fold.Eager(bank, step)
        twin.state.state[:] = 1.0
        return twin

    monkeypatch.setitem(score_fold.VARIANTS, "eager", skewed)
    with pytest.raises(AssertionError, match="eager"):
        score_fold.main(tiny(score_fold, tmp_path / "results.csv"))
    assert not (tmp_path / "results.csv").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clusters", [1, 3])
def test_patching_agrees_before_it_is_timed(scripts: Any, clusters: int, dtype: torch.dtype, tmp_path: Path) -> None:
    module, report = scripts("bench_patch_rows"), scripts("_report")
    work = module.random_work((8, 60, 96), clusters, 7, 2, dtype, CPU)
    out = report.Report("patch_rows", CPU, 3, tmp_path / "results.csv")
    module.run_case("decode", work, out, compiler=lambda function: function)
    assert {row["variant"] for row in out.rows} == {"ours", "eager", "compiled", "dense", "loop"}
    bent = work.vectors_KD + 1.0

    def other(function: Any) -> Any:
        return lambda output, hidden, vectors, *rest: function(output, hidden, bent, *rest)

    with pytest.raises(AssertionError, match="compiled does not agree"):
        module.run_case("decode", work, out, compiler=other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_matching_agrees_before_it_is_timed(scripts: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    module, report = scripts("bench_match_signatures"), scripts("_report")
    bank = module.random_bank(300, 32, dtype, CPU)
    query = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    out = report.Report("match_signatures", CPU, 3, tmp_path / "results.csv")
    module.run_case("small", query, bank, out, compiler=lambda function: function)
    assert {row["variant"] for row in out.rows} == {"ours", "full", "compiled", "loop"}

    def other(function: Any) -> Any:
        return lambda query, *rest: function(query.flip(0), *rest)

    with pytest.raises(AssertionError, match="compiled does not agree"):
        module.run_case("small", query, bank, out, compiler=other)
