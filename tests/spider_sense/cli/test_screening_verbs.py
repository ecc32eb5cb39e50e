"""``spider-sense signatures`` and ``spider-sense screen`` on a tiny model: what they print, keep and refuse."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spider_sense.calibration import calibrate
from spider_sense.cli import commands, main
from spider_sense.cli.app import app, console
from spider_sense.errors import GuardError, SpiderSenseError
from spider_sense.guard import Detector
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.screening.stage_training import MadeStage, assembled
from spider_sense.types import Site

assert commands.__all__

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def run(tiny_loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb on the tiny model, whatever name it asks for; return what it prints."""
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: tiny_loaded)
    # Some everyday requests have more words than the 128 positions of the tiny model.
    monkeypatch.setattr(tiny_loaded.model.config, "max_position_embeddings", 512)
    monkeypatch.setattr(console, "width", 200)

    def invoke(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def texts(first: int, count: int, label: str, seed: int) -> list[dict[str, Any]]:
    """Return prompts of ten words out of eight."""
    draw = Random(seed)
    return [
        {"id": f"{label}-{n}", "text": " ".join(f"w{first + draw.randrange(8)}" for _ in range(10)), "label": label}
        for n in range(count)
    ]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "traffic": write(tmp_path / "traffic.jsonl", texts(0, 120, "benign", 1) + texts(16, 5, "injection", 2)),
        "attacks": write(tmp_path / "attacks.jsonl", texts(30, 6, "injection", 3)),
        "unlike": write(tmp_path / "unlike.jsonl", texts(30, 120, "benign", 5)),
        "ordinary": write(tmp_path / "ordinary.jsonl", texts(0, 6, "benign", 4)),
    }


@pytest.fixture
def bank(run: Run, files: dict[str, Path], tmp_path: Path) -> Path:
    run(
        "signatures", "add", tmp_path / "bank", "--id", "odd-words", "--kind", "injection", "--stage", "query",
        "--examples", files["attacks"], "--provenance", "[bold]tests", "--traffic", files["traffic"],
        "--site", "resid.1",
    )  # fmt: skip
    return tmp_path / "bank"


def test_a_bank_by_hand(run: Run, bank: Path, files: dict[str, Path]) -> None:
    listed = run("signatures", "list", bank)
    assert "odd-words" in listed
    assert "of 120" in listed
    assert "[bold]tests" in listed
    (record,) = json.loads(run("signatures", "list", bank, "--json"))["signatures"]
    assert record["examples"] == 6
    hit, miss = texts(30, 1, "x", 9)[0]["text"], texts(0, 1, "x", 9)[0]["text"]
    found = run("signatures", "search", bank, "--stage", "query", "--text", hit, "--text", miss, "--json")
    rows = json.loads(found.splitlines()[-1])
    assert [(row["text"], row["fires"]) for row in rows] == [(0, True), (1, False)]
    for path in bank.iterdir():
        assert b"w30" not in path.read_bytes()
    run("signatures", "remove", bank, "odd-words")
    assert SignatureBank.from_pretrained(bank).signatures == ()


def test_refused_signatures_leave_the_bank_as_it_was(run: Run, bank: Path, files: dict[str, Path]) -> None:
    before = {path.name: path.read_bytes() for path in bank.iterdir()}
    given = ("signatures", "add", bank, "--stage", "query", "--provenance", "tests")
    for arguments, message in (
        (("--id", "all", "--kind", "misuse", "--examples", files["ordinary"]), "too like ordinary traffic"),
        (("--id", "all", "--kind", "misuse", "--examples", files["attacks"], "--radius", "0.99"), "above the budget"),
        (("--id", "ok", "--kind", "benign", "--examples", files["attacks"]), "ordinary traffic or an attack"),
        (
            ("--id", "ok", "--kind", "benign", "--examples", files["attacks"], "--radius", "0.1"),
            "would excuse 1 of 6 known attacks; it is like ordinary traffic or an attack",
        ),
        (
            ("--id", "odd-words", "--kind", "misuse", "--examples", files["ordinary"]),
            "bank has a signature 'odd-words'",
        ),
        (
            ("--id", "x", "--kind", "misuse", "--examples", files["attacks"], "--traffic", files["unlike"]),
            "keeps its old traffic, because odd-words, which is in it, fails on the new",
        ),
        (("--id", "a b", "--kind", "misuse", "--examples", files["attacks"]), "id: 'a b' is not allowed"),
        (("--id", "x", "--kind", "mischief", "--examples", files["attacks"]), "unknown kind 'mischief'"),
        (("--id", "x", "--kind", "misuse", "--examples", files["attacks"], "--radius", "3"), "radius: 3"),
    ):
        with pytest.raises(SpiderSenseError, match=message):
            run(*given, *arguments)
    with pytest.raises(SpiderSenseError, match="unknown stage 'act'"):
        run("signatures", "search", bank, "--stage", "act", "--text", "x")
    assert {path.name: path.read_bytes() for path in bank.iterdir()} == before


def test_a_signature_and_traffic_are_replaced_in_so_many_words(run: Run, bank: Path, files: dict[str, Path]) -> None:
    given = ("signatures", "add", bank, "--kind", "misuse", "--stage", "query", "--provenance", "tests")
    more = (*given, "--examples", files["attacks"], "--replace", "--traffic", files["traffic"])
    printed = run(*more, "--id", "odd-words")
    assert "traffic: 120 benign and 5 attacks, in place of 120 benign and 5 attacks" in printed
    (kept,) = SignatureBank.from_pretrained(bank).signatures
    assert (kept.about.id, kept.about.kind, kept.about.examples) == ("odd-words", "misuse", 6)
    with pytest.raises(SpiderSenseError, match="too like ordinary traffic"):
        run(*given, "--id", "odd-words", "--replace", "--examples", files["ordinary"])
    assert len(SignatureBank.from_pretrained(bank).signatures) == 1


def test_what_is_replaced_is_not_tried_on_the_new_traffic(run: Run, bank: Path, files: dict[str, Path]) -> None:
    before = {path.name: path.read_bytes() for path in bank.iterdir()}
    given = ("signatures", "add", bank, "--kind", "misuse", "--stage", "query", "--provenance", "tests", "--replace")
    more = ("--id", "odd-words", "--traffic", files["unlike"], "--examples")
    with pytest.raises(SpiderSenseError, match="too like ordinary traffic"):
        run(*given, *more, files["attacks"])
    # The old one is not lost to a new one that was refused.
    assert {path.name: path.read_bytes() for path in bank.iterdir()} == before
    assert "odd-words: radius" in run(*given, *more, files["ordinary"])


def test_the_traffic_of_a_refused_signature_is_kept(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    given = ("signatures", "add", tmp_path / "new", "--kind", "misuse", "--stage", "query", "--provenance", "tests")
    with pytest.raises(SpiderSenseError, match="too like ordinary traffic"):
        run(*given, "--id", "x", "--examples", files["ordinary"], "--traffic", files["traffic"], "--site", "resid.1")
    assert SignatureBank.from_pretrained(tmp_path / "new").signatures == ()
    assert "fires on" in run(*given, "--id", "y", "--examples", files["attacks"])


def test_a_new_bank_needs_traffic(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    given = (
        "signatures", "add", tmp_path / "new", "--id", "x", "--kind", "misuse", "--stage", "query", "--examples",
        files["attacks"], "--provenance", "tests",
    )  # fmt: skip
    with pytest.raises(SpiderSenseError, match="is no bank yet; name benign rows"):
        run(*given)
    with pytest.raises(SpiderSenseError, match=r"--budget 0\.9 is not allowed"):
        run(*given, "--traffic", files["traffic"], "--budget", "0.9")
    with pytest.raises(SpiderSenseError, match="no benign row"):
        run(*given, "--traffic", files["attacks"])
    assert not (tmp_path / "new").exists()


def test_exchange(run: Run, bank: Path, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="model-signing is not installed; the extra sign has it")
    pytest.importorskip("OpenSSL", reason="model-signing imports it")
    run("sign", "--generate-key", tmp_path / "ann")
    run("signatures", "export", bank, tmp_path / "out", "--key", tmp_path / "ann.private.pem")
    assert not (tmp_path / "out" / "traffic.safetensors").exists()
    run("signatures", "remove", bank, "odd-words")
    assert "took odd-words" in run("signatures", "import", bank, tmp_path / "out", "--key", tmp_path / "ann.public.pem")
    again = run("signatures", "import", bank, tmp_path / "out", "--key", tmp_path / "ann.public.pem")
    assert again == "took odd-words\n"
    assert len(SignatureBank.from_pretrained(bank).signatures) == 1


def test_screen(run: Run, bank: Path, tmp_path: Path) -> None:
    odd, plain = texts(30, 1, "x", 9)[0]["text"], texts(0, 1, "x", 9)[0]["text"]
    trace = write(
        tmp_path / "trace.jsonl",
        [{"id": name, "principal": "ann", "messages": [{"role": "user", "content": text}]}
         for name, text in (("bad", odd), ("good", plain), ("bad", odd))],
    )  # fmt: skip
    out = tmp_path / "out.jsonl"
    printed = run("screen", "--trace", trace, "--signatures", bank, "--out", out, "--json")
    counts = json.loads(printed.splitlines()[-1])
    # Without probes everything is a suspect: the signature convicts, and no judge is there to be asked.
    assert counts["decided_by"] == {"signature": 2, "on_failure": 1}
    assert counts["outcomes"] == {"reject": 2, "accept": 1}
    assert counts["escalated"] == 0
    assert "the judge was asked about 0 of 3 spans" in printed
    assert "signature odd-words (injection) fires" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["signature"] for record in records] == ["odd-words", None, "odd-words"]
    assert [record["flagged"] for record in records] == [False, True, False]
    assert "w30" not in out.read_text() + printed


@pytest.mark.parametrize(("out", "says"), [("none/out.jsonl", "does not exist; make it"), (".", "it is a folder")])
def test_a_file_that_cannot_be_written_is_told_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, says: str
) -> None:
    loads: list[str] = []
    monkeypatch.setattr("spider_sense.models.load_model", lambda name, *_: loads.append(name))
    trace = write(tmp_path / "trace.jsonl", [{"id": "a", "messages": [{"role": "user", "content": "w1"}]}])
    with pytest.raises(SpiderSenseError, match=says):
        run("screen", "--trace", trace, "--out", tmp_path / out)
    assert loads == []


def test_screen_with_secrets_and_rules(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPERATOR", "k" * 32)
    write(tmp_path / "secrets.jsonl", [{"owner": "bob", "label": "words", "text": "w20 w21 w22 w23 w24"}])
    config = tmp_path / "screen.yaml"
    config.write_text(f"key_env: OPERATOR\nsecrets: {tmp_path / 'secrets.jsonl'}\n")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w20 w21 w22 w23 w24"},
    ]
    trace = write(tmp_path / "trace.jsonl", [{"id": "t", "principal": "ann", "messages": messages}])
    printed = run("screen", "--trace", trace, "--config", config)
    assert "ann tells 100% of bob's secret 'words', as it is" in printed
    config.write_text("tools: {default: allow, rules: [{tool: look, then: check}, {tool: lock, then: deny}]}\n")
    messages[1] |= {"tool_calls": [{"id": "a", "function": {"name": "look", "arguments": "{}"}}]}
    write(trace, [{"messages": [*messages, {"role": "tool", "tool_call_id": "a", "content": "w2"}]}])
    printed = run("screen", "--trace", trace, "--config", config)
    assert "rule 2 is for 'lock', which no conversation offers or calls" in printed
    assert "rule 1 is for" not in printed
    config.write_text(f"{config.read_text().removesuffix('}' + chr(10))}, known: [look, lock]}}\n")
    assert "is for 'lock'" not in run("screen", "--trace", trace, "--config", config)
    with pytest.raises(SpiderSenseError, match="holds no probes of stages; make some with: make bench-screening"):
        run("screen", "--trace", trace, "--stages", tmp_path / "none")
    config.write_text(f"secrets: {tmp_path / 'secrets.jsonl'}\n")
    with pytest.raises(SpiderSenseError, match="there is no key; name its variable with key_env"):
        run("screen", "--trace", trace, "--config", config)
    config.write_text("stages: {query: {on_failure: shrug}}\n")
    with pytest.raises(SpiderSenseError, match="'shrug' is not allowed"):
        run("screen", "--trace", trace, "--config", config)


@pytest.fixture
def stage_guard(tiny_loaded: Any, tmp_path: Path) -> Path:
    """Probes of what users ask and of plans, with thresholds that nothing reaches."""
    draw, made = torch.Generator().manual_seed(0), []
    for name in ("query", "plan"):
        width = tiny_loaded.model.config.hidden_size
        part = SiteMap(torch.randn(width, 1, generator=draw), torch.zeros(1))
        probe = Probe(name, "logistic", Aggregator(kind="mean"), {Site(layer=1, place="resid"): part})
        far = calibrate(np.full(19, 1000.0), np.full(19, 10), [str(place) for place in range(19)])
        record = Detector(
            name=name,
            family=probe.family,
            sites=("resid.1",),
            aggregator=probe.aggregator,
            calibration=far,
            evidence={},
        )
        made.append(MadeStage(probe, record, (), ()))
    assembled(tiny_loaded, made, {}).guard.save_pretrained(tmp_path / "stages")
    return tmp_path / "stages"


def asked(path: Path, count: int) -> Path:
    rows = texts(0, count, "benign", 7)
    return write(path, [{"id": row["id"], "messages": [{"role": "user", "content": row["text"]}]} for row in rows])


def test_a_guard_of_the_stages_is_calibrated_on_traces(run: Run, stage_guard: Path, tmp_path: Path) -> None:
    before = (stage_guard / "guard.json").read_bytes()
    assert "a breach counts as suspect: 19 spans, and 1.0% needs 99" in run("inspect", stage_guard)
    given = ("calibrate", "--guard", stage_guard, "--model", "x", "--out", tmp_path / "ours")
    printed = run(*given, "--trace", asked(tmp_path / "own.jsonl", 120))
    assert "no span for plan, so the thresholds are those of before" in printed
    # Plans keep what they had, and 120 queries are enough.
    assert "warning" not in printed
    few = run(*given, "--trace", asked(tmp_path / "few.jsonl", 30))
    assert "warning: a breach of query counts as suspect: it rests on 30 spans, and 1.0% needs 99" in few
    assert "warning: a breach of plan" not in few
    run(*given, "--trace", tmp_path / "own.jsonl")
    assert "calibrated on 120 conversations; wrote" in printed
    assert (stage_guard / "guard.json").read_bytes() == before
    shown = run("inspect", tmp_path / "ours")
    assert "Thresholds of query, set on 120 benign spans" in shown
    assert "calibrated anew on" in shown
    assert shown.count("a breach counts as suspect") == 1  # of plans, which keep theirs
    # Before nothing was sensed; now of six spans that reach a threshold one is a breach, and no judge hears the others.
    for guard, decided in ((stage_guard, {"probe": 120}), (tmp_path / "ours", {"probe": 115, "on_failure": 5})):
        printed = run("screen", "--trace", tmp_path / "own.jsonl", "--stages", guard, "--json")
        assert json.loads(printed.splitlines()[-1])["decided_by"] == decided


def test_traffic_must_be_of_the_kind_that_a_guard_reads(
    run: Run, stage_guard: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    given = ("calibrate", "--guard", stage_guard, "--model", "x")
    own = asked(tmp_path / "own.jsonl", 18)
    for arguments, message in (
        ((), "name benign traffic with --data, or for a guard of the stages with --trace"),
        (("--trace", own, "--data", files["traffic"]), "and not both"),
        (("--data", files["traffic"]), "has probes of an agent's stages; name benign conversations with --trace"),
        (("--trace", own), r"18 spans for query cannot show a rate of 0\.05; give 19 or more"),
        (("--trace", write(tmp_path / "none.jsonl", [])), "no conversation to calibrate on"),
        (("--trace", tmp_path / "nowhere.jsonl"), "cannot read"),
        (("--trace", own, "--out", tmp_path), "exists and is no guard"),
    ):
        before = (stage_guard / "guard.json").read_bytes()
        with pytest.raises(SpiderSenseError, match=message):
            run(*given, *arguments)
        assert (stage_guard / "guard.json").read_bytes() == before


def test_a_guard_of_the_stages_is_not_evaluated_on_prompt_sets(
    stage_guard: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("eval", "--guard", stage_guard, "--model", "x", "--data", files["traffic"])
    for detector in ("query", "plan"):
        monkeypatch.setattr(sys, "argv", ["spider-sense", *map(str, given), "--detector", detector])
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert f"error: the detector {detector!r} of {stage_guard} was not made by `spider-sense train`" in error
        assert "says `spider-sense screen`" in error


def test_traces_are_no_traffic_of_a_guard_of_whole_requests(run: Run, tiny_run: Any, tmp_path: Path) -> None:
    with pytest.raises(SpiderSenseError, match="'misuse' is of no stage"):
        run("calibrate", "--guard", tiny_run.folder, "--model", "x", "--trace", asked(tmp_path / "own.jsonl", 20))


def test_a_guard_of_the_stages_is_not_measured_against_disguises(run: Run, stage_guard: Path) -> None:
    with pytest.raises(GuardError, match="has probes of an agent's stages, and evade reads whole requests"):
        run("evade", "--guard", stage_guard, "--model", "x")
