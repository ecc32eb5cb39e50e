"""Nothing crosses a split, and streams are what the configuration says."""

from pathlib import Path

import pytest

from spider_sense.errors import DataError
from spider_sense.extraction.bench.config import BenchConfig, Cell, Groups, Parts
from spider_sense.extraction.bench.parts import PARTS, split_families
from spider_sense.extraction.bench.scene import Scene
from spider_sense.extraction.bench.texts import every_text, load_material
from spider_sense.extraction.simulator.families import load_families
from spider_sense.extraction.simulator.traffic import Stream, texts_of

PEOPLE = tuple((f"person{place}", tuple(f"said {place} {n}" for n in range(30))) for place in range(9))


@pytest.fixture(scope="module")
def config() -> BenchConfig:
    return BenchConfig(
        output=Path("unused"),
        texts=30,
        real_principals=9,
        real_messages=20,
        seeds=(0,),
        principals=Parts(fit=4, calibrate=5, test=3),
        length=100,
        cells=(Cell(start="pivot"),),
        attackers=2,
        after=40,
        organisations=Groups(calibrate=2, test=2),
    )


@pytest.fixture(scope="module")
def scene(config: BenchConfig) -> Scene:
    return Scene(config, load_families(config.texts), PEOPLE, 0)


def test_families_and_people_are_in_one_part_alone() -> None:
    families = load_families(30)
    split = split_families(families, PEOPLE, 5)
    placed = [family.name for part in split.families.values() for family in part]
    assert sorted(placed) == sorted(family.name for family in families)
    assert sorted(name for part in PARTS for name, _ in split.people[part]) == sorted(name for name, _ in PEOPLE)
    assert split_families(families, PEOPLE, 6).families != split.families


def test_too_few_families_are_refused() -> None:
    with pytest.raises(DataError, match="kind 'chat'"):
        split_families([family for family in load_families(30) if family.name == "cooking"], PEOPLE, 0)


def test_no_text_of_the_test_part_is_seen_before(scene: Scene) -> None:
    test = set(texts_of(scene.benign("test")))
    seen = set(texts_of([*scene.benign("fit"), *scene.benign("calibrate")]))
    assert not test & seen
    attack = {request.text for stream in scene.attackers(Cell()) for request in stream.requests if request.attack}
    fitted = {text for family in scene.split.families["fit", "campaign"] for text in family.wrapped()}
    assert not attack & fitted


def test_numbers_and_lengths(scene: Scene, config: BenchConfig) -> None:
    calibration = [stream for stream in scene.benign("calibrate") if stream.family != "real people"]
    assert len(calibration) == 5 * config.principals.calibrate
    assert {len(stream) for stream in calibration} == {config.length}
    assert all(24 <= len(stream) <= config.length for stream in scene.benign("test") if stream.family != "real people")
    assert len({len(stream) for stream in scene.benign("test")}) > 3
    assert len(scene.attackers(Cell(start="pivot"))) == 2 * len(scene.campaigns())
    assert all(stream.first_attack == 60 for stream in scene.attackers(Cell(start="pivot")))
    assert not any(
        request.attack for stream in scene.without_attack(Cell(start="pivot")) for request in stream.requests
    )
    groups = scene.campaign_groups(4)
    assert {len(group) for group in groups} == {4}


def test_a_seed_repeats(scene: Scene, config: BenchConfig) -> None:
    again = Scene(config, scene.families, PEOPLE, 0)
    assert again.benign("test") == scene.benign("test")
    assert again.attackers(Cell()) == scene.attackers(Cell())


def test_every_text_is_known_before(scene: Scene, config: BenchConfig) -> None:
    people = tuple((name, said[: config.real_messages]) for name, said in PEOPLE)
    known = set(every_text(config, scene.families, people))
    streams: list[Stream] = [*scene.benign("test"), *scene.attackers(Cell()), *scene.other_work()]
    streams += [stream for cell in (Cell(), Cell(start="pivot", cover="app")) for stream in scene.attackers(cell)]
    streams += [stream for group in (*scene.organisations("test"), *scene.campaign_groups(3)) for stream in group]
    assert set(texts_of(streams)) <= known


def test_material_without_a_folder_is_what_is_shipped(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIDER_SENSE_DATA", raising=False)
    families, people = load_material(config)
    assert families == load_families(config.texts)
    assert people == ()
