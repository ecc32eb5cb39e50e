"""Sites as they are written."""

from itertools import permutations

import pytest

from spider_sense.errors import SiteError
from spider_sense.types import Site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("resid.12", Site(12, "resid")),
        ("up.0", Site(0, "up")),
        ("gate.3.17", Site(3, "gate", 17)),
        ("up.3.0", Site(3, "up", 0)),
    ],
)
def test_a_site_is_read_as_it_is_written(text: str, site: Site) -> None:
    assert Site.parse(text) == site
    assert str(site) == text


def test_sites_are_ordered_by_layer_place_and_expert() -> None:
    ordered = [
        Site(0, "up"),
        Site(1, "gate"),
        Site(1, "gate", 2),
        Site(1, "gate", 10),
        Site(1, "up", 0),
        Site(2, "gate"),
    ]
    for shuffled in permutations(ordered):
        assert sorted(shuffled) == ordered
    assert Site(1, "gate") != Site(1, "gate", 0)
    assert len({*ordered, *ordered}) == len(ordered)


@pytest.mark.parametrize("text", ["", "gate", "gate.x", "gate.1.", "gate.1.x", "gate.1.2.3", "gate.-1", " gate.1"])
def test_what_is_no_site_is_told_both_forms(text: str) -> None:
    with pytest.raises(
        SiteError, match=r"place\.layer, for example resid\.12, .* place\.layer\.expert, .* gate\.3\.17"
    ):
        Site.parse(text)


def test_an_unknown_place_is_told_the_nearest() -> None:
    with pytest.raises(SiteError, match=r"unknown place 'gates' in site 'gates\.3\.1'; did you mean 'gate'"):
        Site.parse("gates.3.1")


@pytest.mark.parametrize("place", ["resid", "mlp_in"])
def test_places_outside_of_experts_name_none(place: str) -> None:
    with pytest.raises(
        SiteError, match=rf"'{place}\.3\.1' names an expert, and {place} is outside .* write {place}\.3$"
    ):
        Site.parse(f"{place}.3.1")
