"""The probes of the stages find what is planted, on files, contexts and attacks that they have not seen."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from spider_sense import evidence
from spider_sense.activations import ActivationSet
from spider_sense.data import Example
from spider_sense.rates import clopper_pearson
from spider_sense.screening import stage_training
from spider_sense.screening.agent_examples import agent_examples
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.paired_examples import MORE_ATTACKS, paired_examples
from spider_sense.screening.stage_data import StageData, owner
from spider_sense.screening.stage_example import StageExample
from spider_sense.screening.stage_examples import stage_examples
from spider_sense.screening.stage_sets import drift_set, span_set
from spider_sense.screening.stage_training import StageOptions, crossed, folded, make_stage, measure_files
from spider_sense.types import Site

WIDTH, ROWS = 12, 240
SITES = (Site(layer=0, place="resid"), Site(layer=1, place="resid"))


def planted(strength: float, name: str = DRIFT, seed: int = 0, agents: int = 0) -> StageData:
    """Two files of pairs; an attack adds a direction to both sites, each context adds one of its own."""
    draw = np.random.default_rng(seed)
    direction, contexts = draw.normal(size=WIDTH), draw.normal(size=(ROWS // 2, WIDTH))
    examples, rows = [], []
    for index in range(ROWS):
        context, positive = index // 2, index % 2 == 1
        source = "first" if context % 2 else "second"
        label = "injection" if positive else "benign"
        example = Example(
            id=f"{source}/{index}",
            text=f"some words of number {context}",
            label=label,
            category=name,
            source=source,
            group=f"{source}:{context % agents}/{context}" if agents else f"{source}:{context}",
        )
        examples.append(StageExample(example, "observation", f"kind {context % 7}" if positive else ""))
        noise = draw.normal(size=(2, WIDTH))
        rows.append(contexts[context] + noise + positive * strength * direction)
    data = ActivationSet(
        sites=SITES,
        ids=tuple(item.example.id for item in examples),
        hidden=torch.from_numpy(np.stack(rows)).half(),
        starts=np.arange(ROWS + 1),
        prompt_rows=np.ones(ROWS, dtype=np.int64),
        skips=np.zeros(ROWS, dtype=np.int64),
        tail=0,
    )
    return StageData(name, tuple(examples), data, np.full(ROWS, 20))


@pytest.mark.parametrize("name", [DRIFT, "observation"])
def test_a_planted_direction_is_found_on_a_file_that_was_left_out(name: str) -> None:
    found = measure_files(planted(2.0, name), StageOptions())
    assert found.keys() == {"first", "second"}
    for result in found.values():
        assert result["guard"]["n"] == ROWS // 2
        assert result["guard"]["auroc"] > 0.9
        assert result["interval"]["low"] <= result["guard"]["auroc"] <= result["interval"]["high"]
        for control in ("length", "tfidf", "shuffled_labels"):
            assert result[control]["auroc"] < 0.75


def test_nothing_is_found_where_nothing_is_planted() -> None:
    found = crossed(planted(0.0), "first", StageOptions())
    assert 0.35 < found["guard"]["auroc"] < 0.65
    assert found["interval"]["low"] < 0.5 < found["interval"]["high"]


def test_rates_and_areas_have_intervals_over_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    for module, name in ((stage_training, "auroc_interval"), (evidence, "tpr_interval")):
        inner = getattr(module, name)

        def spy(scores: Any, labels: Any, groups: Any, *more: Any, inner: Any = inner, **named: Any) -> Any:
            seen.append(set(groups))
            return inner(scores, labels, groups, *more, **named)

        monkeypatch.setattr(module, name, spy)
    found = folded(planted(1.0, agents=7), "second", StageOptions(folds=3))
    systems, rates = {"guard", "length", "tfidf", "random_direction", "shuffled_labels"}, 2
    assert seen == [{f"second:{agent}" for agent in range(7)}] * (1 + rates * len(systems & found.keys()))
    rate = found["guard"]["tpr_at_1pct_fpr"]
    exact = clopper_pearson(round(rate["value"] * ROWS / 4), ROWS // 4)
    assert rate["low"] < exact.low or rate["high"] > exact.high
    assert rate["low"] <= rate["value"] <= rate["high"]


def test_crossing_trains_on_neither_the_context_nor_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, seen = planted(1.0), []
    inner = stage_training._scored

    def spy(stage: StageData, chosen: Any, train: np.ndarray, test: np.ndarray, options: StageOptions) -> Any:
        seen.append((train, test))
        return inner(stage, chosen, train, test, options)

    monkeypatch.setattr(stage_training, "_scored", spy)
    found = crossed(stage, "first", StageOptions(folds=2))
    groups, attacks = np.array(stage.groups), np.array([item.attack for item in stage.examples])
    for train, test in seen:
        assert not set(groups[train]) & set(groups[test])
        assert not (set(attacks[train][stage.sources[train] == "first"]) & set(attacks[test])) - {""}
        assert set(stage.sources[test]) == {"first"}
    tested = np.concatenate([test for _, test in seen])
    # Every row is measured once, a clean one too: it is one observation, however many folds of attacks there are.
    assert sorted(tested) == np.flatnonzero(stage.sources == "first").tolist()
    assert found["guard"]["n"] == len(tested)
    assert found["guard"]["auroc"] > 0.9


def test_folding_trains_on_no_group_that_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, seen = planted(2.0), []
    inner = stage_training._scored

    def spy(stage: StageData, chosen: Any, train: np.ndarray, test: np.ndarray, options: StageOptions) -> Any:
        seen.append((train, test))
        return inner(stage, chosen, train, test, options)

    monkeypatch.setattr(stage_training, "_scored", spy)
    found = folded(stage, "second", StageOptions(folds=3))
    groups = np.array(stage.groups)
    assert all(not set(groups[train]) & set(groups[test]) for train, test in seen)
    assert sorted(np.concatenate([test for _, test in seen])) == np.flatnonzero(stage.sources == "second").tolist()
    assert found["guard"]["auroc"] > 0.9


def test_an_agent_is_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, seen = planted(2.0, agents=5), []
    inner = stage_training._choose

    def spy(stage: StageData, train: np.ndarray, validation: np.ndarray) -> Any:
        seen.append((train, validation))
        return inner(stage, train, validation)

    monkeypatch.setattr(stage_training, "_choose", spy)
    made = make_stage(stage, np.zeros(ROWS, dtype=bool), {}, StageOptions())
    ((train, validation),) = seen
    owners = np.array(stage.owners)
    assert len(set(owners)) == 10
    assert not set(owners[train]) & set(owners[validation])
    # Of each file two of its five agents, half of whose rows are harmless.
    assert made.record.calibration.n == 2 * 2 * ROWS // 10 // 2


def test_the_served_probe_leaves_out_what_it_is_told_to() -> None:
    stage = planted(1.0)
    made = make_stage(stage, stage.sources == "second", {}, StageOptions())
    assert made.record.name == DRIFT
    assert made.record.calibration.n < ROWS // 4
    assert {record.detector for record in made.control_records} == {DRIFT}
    poisoned = stage.data.hidden.clone()
    poisoned[torch.from_numpy(stage.sources == "second")] += 5
    other = dataclasses.replace(stage, data=dataclasses.replace(stage.data, hidden=poisoned))
    again = make_stage(other, stage.sources == "second", {}, StageOptions())
    for site, part in made.probe.maps.items():
        torch.testing.assert_close(part.weight, again.probe.maps[site].weight)
    assert again.record.calibration.buckets == made.record.calibration.buckets


def test_spans_and_differences_are_cut_from_what_was_captured() -> None:
    data = ActivationSet(
        sites=SITES[:1],
        ids=("a", "b"),
        hidden=torch.arange(10.0).view(10, 1, 1).half(),
        starts=np.array([0, 4, 10]),
        prompt_rows=np.array([4, 6]),
        skips=np.array([3, 2]),
        tail=0,
    )
    spans = span_set(data, [1, 0], [slice(3, 5), slice(3, 7)])
    assert spans.hidden.flatten().tolist() == [5.5, 1.5]
    assert (spans.ids, spans.starts.tolist(), spans.skips.tolist()) == (("b", "a"), [0, 1, 2], [0, 0])
    differences = drift_set(data, [1], [(slice(2, 4), slice(5, 8))])
    assert differences.hidden.flatten().tolist() == [3.5]
    with pytest.raises(ValueError, match="were not captured"):
        span_set(data, [0], [slice(2, 4)])
    with pytest.raises(ValueError, match="were not captured"):
        span_set(data, [0], [slice(5, 8)])


def test_the_package_s_own_examples_end_with_their_stage() -> None:
    examples = stage_examples(None)
    assert {item.stage for item in examples} == {"query", "observation"}
    assert all(item.example.turns and item.example.turns[-1][1] == item.example.text for item in examples)
    assert all(bool(item.attack) == item.positive for item in examples if item.stage == "observation")
    assert len({item.example.id for item in examples}) == len(examples)
    # A pair is one group, and so is a text that stands alone.
    asked = [item.example.group for item in examples if item.stage == "query"]
    read = [item.example.group for item in examples if item.stage == "observation"]
    assert len(set(asked)) == len(asked)
    assert 2 * len(set(read)) == len(read)


def test_a_context_meets_more_attacks_than_its_file_gives_it() -> None:
    goals = [f"Do {place} at once." for place in range(10)]
    rows: list[dict[str, Any]] = []
    for pair in range(6):
        fields = {"user_task": "Q: how many?", "pair": pair}
        clean, line = f"one {pair}\ntwo\nthree", goals[pair]
        rows.append({"id": f"c{pair}", "text": clean, "label": "benign", "category": "bipia_email_clean", **fields})
        attack = {"label": "injection", "category": f"bipia_table:kind {pair}", "injection_goal": line}
        rows.append({"id": f"i{pair}", "text": f"{clean}\n{line}", **attack, **fields})
    examples = list(paired_examples(rows, "s"))
    assert len({item.example.id for item in examples}) == len(examples) == 12 + 6 * MORE_ATTACKS
    for pair in range(6):
        own = [item for item in examples if item.example.group == f"s:{pair}"]
        (clean,) = (item.example.text for item in own if not item.positive)
        injected = [item for item in own if item.positive]
        assert len({item.attack for item in injected}) >= MORE_ATTACKS
        for item in injected:
            (added,) = set(item.example.text.split("\n")) - set(clean.split("\n"))
            assert item.attack == f"kind {goals.index(added)}"
    places = {
        item.example.text.split("\n").index(line) for item in examples for line in goals if line in item.example.text
    }
    assert places == {0, 1, 3}


def test_an_agent_s_plans_and_calls_are_not_told_apart_by_their_tools() -> None:
    rows: list[dict[str, Any]] = []
    for agent in ("a", "b"):
        for place in range(8):
            text = f"Please wire sum {place} away."
            own = {"tool": f"Thief{place}", "category": "asb_attack:Stealthy", "label": "injection"}
            rows.append({"id": f"{agent}x{place}", "text": text, "agent": agent, **own})
        for place in range(3):
            task = {"category": "asb_user_task", "label": "benign", "tool": None}
            rows.append({"id": f"{agent}t{place}", "text": f"Plan day {place} of {agent}.", "agent": agent, **task})
        for tool in ("mail", "desk"):
            output = {"category": "asb_normal_tool_output", "label": "benign", "tool": tool}
            rows.append({"id": f"{agent}{tool}", "text": "Done well.", "agent": agent, **output})
    examples = list(agent_examples(rows, "s"))
    assert len({item.example.id for item in examples}) == len(examples)
    # A harmless conversation comes once, and all of an agent's are one owner's.
    harmless = [item.example.turns for item in examples if not item.positive]
    assert len(set(harmless)) == len(harmless)
    assert {owner(item.example.group) for item in examples} == {"s:a", "s:b"}
    for stage in ("plan", "action"):
        texts = {
            positive: [item.example.text for item in examples if item.stage == stage and item.positive == positive]
            for positive in (False, True)
        }
        assert all(texts.values())
        found = {
            positive: {tool for tool in ("mail", "desk") for text in some if tool in text}
            for positive, some in texts.items()
        }
        assert found[True] == found[False] == {"mail", "desk"}
        assert not any("Thief" in text or "Please" in text for text in texts[True])
        # A harmless one, too, may be of something that the user did not ask for just now.
        asked = [
            turns[0][1]
            for item in examples
            if item.stage == stage and not item.positive and (turns := item.example.turns)
        ]
        assert {said in text for said, text in zip(asked, texts[False], strict=True)} == {True, False}
