"""Families of texts: the shipped ones, and those of a folder."""

import json
from pathlib import Path

import pytest

from spider_sense.errors import DataError
from spider_sense.extraction.simulator.families import filled, load_families, real_streams


def test_the_shipped_families_are_whole_and_repeat() -> None:
    families = load_families(50)
    assert families == load_families(50)
    assert len({family.name for family in families}) == len(families)
    assert {family.kind for family in families} == {"chat", "app", "harness", "labelling", "tutoring", "campaign"}
    for family in families:
        assert len(family.texts) == len(set(family.texts)) >= 30, family.name
        assert not [text for text in family.wrapped() if "{" in text or "}" in text], family.name


def test_no_text_of_a_campaign_is_innocent_elsewhere() -> None:
    families = load_families(200)
    innocent = {text for family in families if family.kind != "campaign" for text in family.texts}
    assert not [
        text for family in families if family.kind == "campaign" for text in family.wrapped() if text in innocent
    ]


def test_more_texts_begin_with_the_fewer() -> None:
    few, many = filled(["{a} {n}"], {"a": ["x", "y"]}, 5, "s"), filled(["{a} {n}"], {"a": ["x", "y"]}, 9, "s")
    assert many[:5] == few


def test_a_family_without_numbers_ends() -> None:
    assert sorted(filled(["{a}"], {"a": ["x", "y"]}, 9, "s")) == ["x", "y"]


def test_real_streams_keep_their_order(tmp_path: Path) -> None:
    rows = [{"principal": "p", "family": "irc", "n": n, "text": f"t{n}"} for n in range(3)]
    (tmp_path / "streams_benign.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert real_streams(tmp_path) == {"p": ("irc", ("t0", "t1", "t2"))}


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"streams_benign\.jsonl"):
        real_streams(tmp_path)
