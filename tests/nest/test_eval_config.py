"""Which rows are measured."""

import pytest

from nest.eval_config import EvalConfig, attacks_named, select_sets
from spider_sense.config import parse
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError


def rows(label: str, count: int, source: str) -> list[Example]:
    return [
        Example(id=str(n), text=f"w{n}", label=label, category="", source=source, group=f"{source}:{n}")
        for n in range(count)
    ]


def test_the_limit_holds_for_each_file_and_the_rest_is_spare() -> None:
    harmful = rows("harmful", 9, "one") + rows("harmful_noisy", 3, "two") + rows("benign", 4, "one")
    sets = select_sets(EvalConfig(limit=5), harmful=harmful, benign=rows("benign", 6, "three"))
    assert [row.source for row in sets.harmful] == ["one"] * 5 + ["two"] * 3
    assert {row.label for row in sets.harmful} == {"harmful", "harmful_noisy"}
    assert len(sets.spare_harmful) == 4
    assert not set(sets.spare_harmful) & set(sets.harmful)
    assert (len(sets.benign), len(sets.spare_benign)) == (5, 1)


def test_wrappers_around_benign_requests_are_a_control() -> None:
    mixed = rows("jailbreak", 3, "wrappers") + [
        Example(id=f"b{n}", text="w1", label="jailbreak_benign_payload", category="", source="wrappers", group=f"b{n}")
        for n in range(2)
    ]
    sets = select_sets(EvalConfig(), jailbreak=mixed)
    assert (len(sets.jailbreak), len(sets.wrapped)) == (3, 2)
    assert select_sets(EvalConfig(), jailbreak=rows("jailbreak", 3, "wrappers")).wrapped == ()


def test_a_file_without_the_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"no row for --harmful: the labels are \['benign'\]"):
        select_sets(EvalConfig(), harmful=rows("benign", 2, "one"))
    with pytest.raises(DataError, match="no row for --borderline"):
        select_sets(EvalConfig(), borderline=rows("harmful", 2, "one"))


def test_attacks_come_by_name() -> None:
    assert attacks_named("ablation, prefill") == ("prefill", "ablation")
    assert attacks_named("") == ()
    with pytest.raises(ConfigError, match="unknown attack 'prefil'; did you mean 'prefill'"):
        attacks_named("prefil")


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"tokens": 0}, {"prefix": ""}, {"attacks": ["gcg"]}, {"limits": 3}])
def test_bad_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse(wrong, EvalConfig, origin="test")
