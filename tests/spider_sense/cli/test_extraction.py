"""``spider-sense extraction``, from logs with hidden states to a page."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from spider_sense.cli.app import app
from spider_sense.cli.extraction import extraction  # noqa: F401  registers the verbs
from spider_sense.errors import SpiderSenseError
from spider_sense.extraction.keys import Key
from spider_sense.models import LoadedModel

WIDTH = 80
RUNNER = CliRunner()


def _log(path: Path, names: list[str], requests: int, *, attack_from: int | None = None, family: str = "") -> Path:
    """Write principals whose hidden states scatter around a mean of their own; an attack moves ten numbers."""
    lines = []
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        centre = rng.normal(0, 0.5, WIDTH)
        for index in range(requests):
            hidden = centre + rng.normal(0, 1, WIDTH)
            attacks = attack_from is not None and index >= attack_from
            if attacks:
                hidden[:10] += 3
            row = {"principal": name, "time": 60 * index, "hidden": (hidden / 4).round(4).tolist(), "tokens": 30}
            row |= {"family": family} if family else {"tenant": "app"}
            if name.startswith("ring"):
                row["links"] = {"payment": "card", "network": "AS 1"}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _run(*arguments: object) -> Result:
    return RUNNER.invoke(app, ["extraction", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted and calibrated extraction guard, its key, and a log to judge."""
    folder = tmp_path_factory.mktemp("extraction")
    benign = _log(folder / "benign.jsonl", [f"a{i}" for i in range(80)], 40)
    campaigns = _log(folder / "campaigns.jsonl", ["c1", "c22"], 640, attack_from=0, family="reasoning")
    held = _log(folder / "held.jsonl", [f"held{i}" for i in range(110)], 40)
    done = _run(
        *("fit", "--benign", benign, "--campaigns", campaigns, "--key", folder / "key", "--out", folder / "guard")
    )
    assert done.exit_code == 0, done.output
    assert "80 honest principals; probes any campaign, reasoning" in done.output
    assert f"made a new key, {folder / 'key'}; keep it" in done.output
    key = ("--key", folder / "key")
    budget = ("--own", 0.01, "--level", 0.01, "--group", 0.01)
    done = _run("calibrate", folder / "guard", "--benign", held, *key, *budget)
    assert done.exit_code == 0, done.output
    assert "level is uncertified: 110 of 110 honest principals have no `family`" in done.output
    traffic = _log(folder / "traffic.jsonl", [f"user{i}" for i in range(12)], 60).read_text()
    traffic += _log(folder / "pivot.jsonl", ["pivot"], 140, attack_from=60).read_text()
    traffic += _log(folder / "ring.jsonl", [f"ring{i}" for i in range(5)], 40).read_text()
    (folder / "traffic.jsonl").write_text(traffic)
    return folder


def test_a_log_is_judged(folder: Path) -> None:
    done = _run("score", folder / "guard", "--data", folder / "traffic.jsonl", "--key", folder / "key", "--json")
    decisions = [json.loads(line) for line in done.stdout.splitlines()]
    alarmed = {decision["principal"] for decision in decisions if decision["level"] != "watch"}
    assert "pivot" in alarmed
    assert len([name for name in alarmed if name.startswith("user")]) <= 2
    done = _run("score", folder / "guard", "--data", folder / "traffic.jsonl", "--key", folder / "key")
    assert "18 principals" in done.output
    assert "1 linked groups" in done.output
    assert "no longer look like" in done.output


def test_the_page_shows_principals_groups_and_thresholds(folder: Path) -> None:
    page = folder / "page.html"
    done = _run("report", folder / "guard", "--data", folder / "traffic.jsonl", "--key", folder / "key", "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") >= 3
    for piece in ("pivot", "Linked groups", "uncertified", "Extraction is made dearer"):
        assert piece in text
    assert "http" not in text.replace("http-equiv", "")


def test_names_in_a_log_cannot_write_into_the_page(folder: Path) -> None:
    evil = '<script>alert("x")</script>$\\frac$ \u6771\u4eac'
    log = _log(folder / "evil.jsonl", [evil], 120, attack_from=60)
    page = folder / "evil.html"
    done = _run("report", folder / "guard", "--data", log, "--key", folder / "key", "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text
    assert "<script" not in text


def test_text_without_a_model_is_warned_about(folder: Path) -> None:
    log = folder / "text.jsonl"
    log.write_text("\n".join(json.dumps({"principal": "t", "time": i, "text": f"Say {i}"}) for i in range(20)))
    done = _run("score", folder / "guard", "--data", log, "--key", folder / "key")
    assert "20 of 20 requests have no activations" in done.output
    assert "activations of 0 of" in done.output


def _wide(tiny_loaded: LoadedModel) -> LoadedModel:
    """Return a tiny model that is wide enough for a sketch."""
    config = copy.deepcopy(tiny_loaded.model.config)
    config.hidden_size = 64
    config.head_dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(tiny_loaded.model)(config).eval()
    return dataclasses.replace(tiny_loaded, model=model)


def _words(path: Path, names: list[str], requests: int, first: int, family: str = "") -> Path:
    """Write principals who draw six words of ten, from another ten for a campaign."""
    rng = np.random.default_rng(first)
    rows = [
        {"principal": name, "time": turn, "text": " ".join(f"w{first + n}" for n in rng.integers(0, 10, 6))}
        for name in names
        for turn in range(requests)
    ]
    path.write_text("\n".join(json.dumps(row | ({"family": family} if family else {})) for row in rows))
    return path


def test_text_is_read_by_the_model_that_was_fitted_on(
    tmp_path: Path, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = {"wide": _wide(tiny_loaded), "other": tiny_loaded}
    monkeypatch.setattr("spider_sense.models.load_model", lambda name, dtype, device: served[name])
    monkeypatch.setattr("spider_sense.models.layers_of", lambda name: 2)
    honest = _words(tmp_path / "honest.jsonl", [f"h{i}" for i in range(44)], 30, 0)
    campaign = _words(tmp_path / "campaign.jsonl", ["c"], 600, 20, family="exam")
    key = ("--key", tmp_path / "key", "--model")
    fitted = ("fit", "--benign", honest, "--campaigns", campaign, "--site", "resid.1", "--out", tmp_path / "guard")
    assert "44 honest principals; probes any campaign, exam" in _run(*fitted, *key, "wide").output
    log = _words(tmp_path / "log.jsonl", ["suspect"], 40, 20)
    found = _run("score", tmp_path / "guard", "--data", log, *key, "wide", "--json").stdout
    assert [json.loads(line)["tier"] for line in found.splitlines() if line.startswith("{")] == ["level"]
    with pytest.raises(SpiderSenseError, match="weight_digest"):
        _run("score", tmp_path / "guard", "--data", log, *key, "other")


def test_a_system_prompt_for_a_template_that_takes_none_is_told(
    folder: Path, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sense.models.load_model", lambda name, dtype, device: tiny_loaded)
    monkeypatch.setattr("spider_sense.models.layers_of", lambda name: 2)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tiny_loaded.tokenizer.chat_template = refusing + tiny_loaded.tokenizer.chat_template
    messages = [{"role": "system", "content": "w40"}, {"role": "user", "content": "w20"}]
    log = _words(folder / "plain.jsonl", [f"h{i}" for i in range(40)], 16, 0)
    campaign = folder / "system.jsonl"
    campaign.write_text(json.dumps({"principal": "t", "time": 1, "messages": messages, "family": "exam"}))
    logs = ("--benign", log, "--campaigns", campaign, "--model", "tiny", "--site", "resid.1")
    with pytest.raises(SpiderSenseError, match="a request of 't' has turns of system, user"):
        _run("fit", *logs, "--key", folder / "key", "--out", folder / "new")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--key": "other"}, "fitted under"),
        ({"--key": "none"}, "cannot read"),
        ({"--data": "none.jsonl"}, "cannot read"),
        ({"--out": "missing/page.html"}, "does not exist"),
    ],
)
def test_mistakes_are_told(folder: Path, change: dict[str, str], says: str) -> None:
    if not (folder / "other").exists():
        Key.create(folder / "other")
    options = {"--data": "traffic.jsonl", "--key": "key", "--out": "page.html"} | change
    arguments = [str(part) for name, value in options.items() for part in (name, folder / value)]
    with pytest.raises(SpiderSenseError, match=says):
        _run("report", folder / "guard", *arguments)


def test_a_fit_needs_families_and_hidden_states(folder: Path) -> None:
    log = ("--benign", folder / "benign.jsonl", "--campaigns", folder / "held.jsonl")
    with pytest.raises(SpiderSenseError, match="a family in each of their rows"):
        _run("fit", *log, "--key", folder / "key", "--out", folder / "new")
    text = folder / "words.jsonl"
    text.write_text(json.dumps({"principal": "t", "time": 1, "text": "Hello", "family": "x"}))
    with pytest.raises(SpiderSenseError, match="name a model"):
        _run("fit", *log[:3], text, "--key", folder / "key", "--out", folder / "new")
    same = ("--benign", text, "--campaigns", folder / "new" / ".." / "words.jsonl")
    with pytest.raises(SpiderSenseError, match=r"words\.jsonl stands in --benign and in --campaigns; give each log to"):
        _run("fit", *same, "--key", folder / "key", "--out", folder / "new")


def _never_loaded(name: str, dtype: str, device: str) -> LoadedModel:
    raise AssertionError(f"{name} is loaded although the log cannot be used")


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sense.models.load_model", _never_loaded)
    monkeypatch.setattr("spider_sense.models.layers_of", lambda name: 19)
    few = _words(tmp_path / "few.jsonl", [f"h{i}" for i in range(39)], 16, 0)
    enough = _words(tmp_path / "enough.jsonl", [f"h{i}" for i in range(40)], 16, 0)
    campaign = _words(tmp_path / "campaign.jsonl", ["c"], 16, 20, family="exam")
    lists = [tmp_path / f"list{place}.jsonl" for place in range(9)]
    for path in lists:
        path.write_text(json.dumps({"text": "Only one"}))
    options = ("--campaigns", campaign, "--model", "tiny", "--key", tmp_path / "key", "--out", tmp_path / "guard")
    with pytest.raises(SpiderSenseError, match="39 of 39 honest principals sent 16 requests or more"):
        _run("fit", "--benign", few, *options)
    assert not (tmp_path / "key").exists()
    with pytest.raises(SpiderSenseError, match="9 known lists; at most 8"):
        _run("fit", "--benign", enough, *options, *(part for path in lists for part in ("--known-list", path)))
    key = ("--key", folder / "key", "--model", "tiny")
    with pytest.raises(SpiderSenseError, match="80 of 80 principals were fitted on, 'a0' among them"):
        _run("calibrate", folder / "guard", "--benign", folder / "benign.jsonl", *key)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"principal": "t", "time": 1, "hidden": [1.0] * 79}))
    for verb in ("score", "report"):
        with pytest.raises(SpiderSenseError, match="79 hidden numbers, expected 80"):
            _run(verb, folder / "guard", "--data", short, *key)


def test_a_site_above_the_last_layer_is_refused_by_the_configuration_alone(folder: Path, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=18).save_pretrained(tmp_path)
    logs = ("--benign", folder / "benign.jsonl", "--campaigns", folder / "campaigns.jsonl", "--model", tmp_path)
    with pytest.raises(SpiderSenseError, match=r"site resid\.18: the model has layers 0 to 17"):
        _run("fit", *logs, "--key", tmp_path / "key", "--out", tmp_path / "guard")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(SpiderSenseError, match="cannot load"):
        _run("fit", *logs, "--site", "resid.17", "--key", tmp_path / "key", "--out", tmp_path / "guard")


def test_a_threshold_that_limits_nobody_is_said_to_and_not_certified(folder: Path, tmp_path: Path) -> None:
    """One kind of work tells nothing of the next; two that lie apart put the margin above all levels."""
    one = _log(tmp_path / "one.jsonl", [f"one{i}" for i in range(299)], 16, family="chat")
    two = _log(tmp_path / "two.jsonl", [f"two{i}" for i in range(20)], 16, attack_from=0, family="exams")
    told = {}
    for name, logs in {"one": (one,), "both": (one, two)}.items():
        chosen = [part for log in logs for part in ("--benign", log)]
        done = _run("calibrate", folder / "guard", *chosen, "--key", folder / "key", "--out", tmp_path / name)
        told[name] = " ".join(done.output.split())
    assert "warning: level never limits everybody: too few kinds of work, at least 2 are needed" in told["one"]
    assert "0.40% never limits unknown too few kinds of work" in told["one"]
    assert "warning: own never limits everybody: too few of 299 honest principals sent enough" in told["one"]
    assert "the threshold is" in told["both"]
    assert "nothing can exceed" in told["both"]
    assert "no `family`" not in told["one"] + told["both"]
    assert "more kinds of honest work, each named in `family`" in told["both"]
    page = tmp_path / "page.html"
    _run("report", tmp_path / "one", "--data", folder / "pivot.jsonl", "--key", folder / "key", "--out", page)
    level = page.read_text().split("level against honest principals</td>")[1].split("</tr>")[0]
    assert "never limits" in level
    assert "too few kinds of work" in level
    assert "<td>uncertified</td>" in level


def test_how_many_kinds_of_evidence_a_link_needs_is_said(folder: Path, tmp_path: Path) -> None:
    held, ring = folder / "held.jsonl", folder / "ring.jsonl"
    options = ("--key", folder / "key", "--out", tmp_path / "guard")
    said = "on a fit of 80 principals, accounts are linked that share 2 kinds of evidence (payment, network, client)"
    done = _run("calibrate", folder / "guard", "--benign", held, *options)
    assert said in done.output
    assert "linked groups can hardly be found: this log has none of them" in done.output
    done = _run("calibrate", folder / "guard", "--benign", held, "--benign", ring, *options)
    assert said in done.output
    assert "hardly" not in done.output
