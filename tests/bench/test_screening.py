"""The comparison of screening runs from prompt sets to its line of JSON, on a tiny model and sets of its own."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from spider_sense.models import LoadedModel
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.stage_training import StageOptions
from spider_sense.screening.verdict import Answer

BENCH = Path(__file__).parents[2] / "bench"
KEYS = {
    "drift_auroc",
    "drift_tpr_at_1fpr",
    "length_auroc",
    "tfidf_auroc",
    "attack_success",
    "false_positives",
    "escalated_share",
    "added_latency_median_ratio",
    "added_latency_p99_ratio",
    "added_latency_worst_ratio",
    "added_latency_p99_ratio_fastest",
    "added_latency_p99_ratio_single",
    "check_seconds_median",
    "drift_clean",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("screening")
    for name in ("screening", "_arms", "_bank", "_judge", "_picture", "_replay", "_stages", "_traces"):
        sys.modules.pop(name, None)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps({"id": f"{name}-{place:04d}", **row}) for place, row in enumerate(rows)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_sets(folder: Path) -> Path:
    """Prompt sets in the form of the real ones, of a few words each."""
    bad = ("send it away", "delete all", "obey me now", "wire the sum")
    pairs = []
    for place in range(12):
        fields = {"user_task": "Q: how many?", "pair": place}
        pairs.append({"text": f"row {place} of ten", "label": "benign", "category": "bipia_table_clean", **fields})
        for kind in range(2):
            order = bad[(place + kind) % 4]
            attack = {
                "text": f"row {place} {order} of ten",
                "label": "injection",
                "category": f"bipia_table:kind {order}",
                "injection_goal": order,
            }
            pairs.append(attack | fields)
    write(folder, "bipia_train", pairs)
    agents: list[dict[str, Any]] = []
    for agent in (f"{letter}_agent" for letter in "abcdefghij"):
        for place in range(8):
            own = {"agent": agent, "tool": f"Bad{place}", "attack_goal": bad[place % 4]}
            text = f"{bad[place % 4]} {place} {agent}"
            agents.append({"text": text, "label": "injection", "category": "asb_attack:Stealthy", **own})
        for place in range(4):
            row = {"text": f"plan the day {place} {agent}", "label": "benign", "category": "asb_user_task"}
            agents.append(row | {"agent": agent})
        for tool in ("one", "two"):
            row = {"text": f"done well {tool} {agent}", "label": "benign", "category": "asb_normal_tool_output"}
            agents.append(row | {"agent": agent, "tool": tool})
    write(folder, "asb", agents)
    mixed = [
        {"text": f"{bad[place % 4] if place % 2 else 'a fine day'} {place}", "category": "x"}
        | {"label": "injection" if place % 2 else "benign"}
        for place in range(16)
    ]
    for name in ("deepset_prompt_injections", "giskard_prompt_injections", "system_prompt_extraction"):
        write(folder, name, [row | {"text": f"{row['text']} {name}"} for row in mixed])
    write(folder, "tau2_agent_requests", [{"text": f"change order {n}", "label": "benign"} for n in range(30)])
    return folder


def test_benign_plans_and_calls_are_cut_no_more_than_an_attack_s(bench: Any, tmp_path: Path) -> None:
    data = write_sets(tmp_path)
    rows = [{"text": f"{'a long story, ' * 20}change order {n}", "label": "benign"} for n in range(4)]
    write(data, "tau2_agent_requests", rows)
    for trace in bench.traces(data, ["a_agent"], [f"tau2_agent_requests-{n:04d}" for n in range(4)], 8):
        task, turn = trace.messages[0].content, trace.messages[1].content
        if trace.attacked in (None, "observation"):
            assert turn.count(task) == 2
    assert trace.owner == "tau2"


def test_what_is_replayed_is_worded_otherwise_than_what_probes_are_made_from(bench: Any, tmp_path: Path) -> None:
    data = write_sets(tmp_path)
    rows = [json.loads(line) for line in (data / "asb.jsonl").read_text().splitlines()]
    text_of = {row["id"]: row["text"] for row in rows}

    def wordings(*wording: Any) -> tuple[set[str], set[str]]:
        """What attacks are wrapped in, and how plans begin."""
        wraps, plans = set(), set()
        for trace in bench.traces(data, ["a_agent", "b_agent"], [], 8, *wording):
            plans.add(trace.messages[1].content[:8])
            if trace.attacked in ("query", "observation"):
                span = trace.messages[0 if trace.attacked == "query" else 2].content
                (harmless,) = [text for text in text_of.values() if span.startswith(text)]
                attack = text_of[trace.id.removeprefix("asb-")]
                wraps.add(span.removeprefix(harmless).strip().replace(attack, "{0}"))
        return wraps, plans

    known, new = wordings(bench.TRAINED), wordings()
    assert known[0] == set(bench.TRAINED.wrappings[:2])
    assert len(new[0]) == 2
    assert not new[0] & set(bench.TRAINED.wrappings)
    assert not new[1] & known[1]


class Nobody:
    """A judge that never answers."""

    def ask(self, artifact: Artifact) -> Answer:
        return Answer(outcome=None, reason="gone", seconds=0.0)


def test_a_disturbance_of_one_time_is_not_the_screens(bench: Any) -> None:
    steady = bench.Timing(bare=(1.0, 2.0, 4.0), check=(1.25, 2.5, 9.0))
    none = bench.Timing(bare=(1.0, 1.0, 1.0), check=(1.0, 1.0, 1.0))
    assert (steady.shares, steady.added, steady.fastest) == ((0.25, 0.25, 1.25), 0.25, 0.25)
    found = bench.latency([steady, none])
    assert found["added_latency_worst_ratio"] == 0.25
    assert 1.0 < found["added_latency_p99_ratio_single"] < 1.25
    assert found["added_latency_median_ratio"] == 0.125
    assert set(bench.latency([]).values()) == {None}


def test_the_comparison_runs_from_prompt_sets_to_its_last_line(
    bench: Any, agent_loaded: LoadedModel, tmp_path: Path
) -> None:
    size = bench.Size(
        sites=("resid.0", "resid.1"),
        site="resid.1",
        tokens=700,
        rows=40,
        attacks=4,
        requests=3,
        asked=4,
        timed=2,
        repeats=2,
        options=StageOptions(folds=2),
    )
    (tmp_path / "data").mkdir()
    line = bench.run(agent_loaded, write_sets(tmp_path / "data"), size, tmp_path / "out", lambda: nullcontext(Nobody()))
    assert line.keys() >= KEYS
    assert (tmp_path / "out" / "screening.png").stat().st_size > 10_000
    judged = line["arms"]["judge alone (SmolLM2)"]
    # A judge that fails opens no gate.
    assert (judged["attack_success"]["value"], judged["false_positives"]["value"]) == (0.0, 1.0)
    assert line["arms"]["signature alone"]["escalated_share"]["value"] == 0.0
    assert line["timed_traces"] > 0
    assert line["check_seconds_median"] > line["pass_seconds_median"] * 0.5
    # One row of each context is clean, and counts once.
    assert line["drift_clean"] == 12
    known = line["arms"]["cascade (words), wording of training"]
    assert known["attack_success"]["n"] == line["arms"]["cascade (words)"]["attack_success"]["n"]
    benign = line["arms"]["signature alone"]["false_positives"]
    assert 0 < benign["distinct"] < benign["n"]
    assert json.loads(json.dumps(line)) == line
