"""Attackers: how much of an account is a campaign's, when it begins, and behind what."""

from collections.abc import Sequence

import numpy as np
import pytest

from spider_sense.extraction.simulator.accounts import Evidence, campaign_accounts, organisation
from spider_sense.extraction.simulator.campaigns import COVERS, STARTS, Cover, Mixing, attacker
from spider_sense.extraction.simulator.families import Family, Kind
from spider_sense.extraction.simulator.tenants import Tenant, resampled

CHAT = Family(name="chat", kind="chat", texts=tuple(f"chat {place}" for place in range(40)))
OTHER = Family(name="other", kind="chat", texts=tuple(f"other {place}" for place in range(40)))
APP = Family(name="app", kind="app", texts=tuple(f"app {place}" for place in range(10)))
CAMPAIGN = Family(
    name="list", kind="campaign", texts=tuple(f"task {place}" for place in range(30)), wrappers=("Do: {payload}",)
)


def covers(cover: Cover) -> Sequence[Tenant]:
    kind: Kind = "app" if cover == "app" else "chat"
    return [
        Tenant(name=f"c{place}", kind=kind, families=[APP] if cover == "app" else [[CHAT], [OTHER]][place % 2])
        for place in range(4)
    ]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cover", COVERS)
def test_a_stream_repeats_and_its_times_ascend(start: str, cover: Cover) -> None:
    mixing = Mixing(share=0.5, start=start, cover=cover, warm_up=20, ramp=50)  # type: ignore[arg-type]
    one, same = (attacker("a", CAMPAIGN, mixing, covers, 120, 3) for _ in range(2))
    assert one == same
    assert one != attacker("a", CAMPAIGN, mixing, covers, 120, 4)
    times = [request.time for request in one.requests]
    assert times == sorted(times)
    assert all(request.attack == request.text.startswith("Do: ") for request in one.requests)
    assert any(request.attack for request in one.requests)


def test_a_pivot_begins_after_its_warm_up() -> None:
    stream = attacker("a", CAMPAIGN, Mixing(start="pivot", warm_up=20), covers, 60, 0)
    assert [request.attack for request in stream.requests] == [False] * 20 + [True] * 40
    assert stream.first_attack == 20


def test_the_share_is_kept() -> None:
    stream = attacker("a", CAMPAIGN, Mixing(share=0.25), covers, 2000, 0)
    assert np.mean([request.attack for request in stream.requests]) == pytest.approx(0.25, abs=0.04)


def test_a_ramp_rises() -> None:
    shares = Mixing(share=0.8, start="ramp", ramp=100).shares(200)
    assert shares[0] == 0
    assert (np.diff(shares) >= 0).all()
    assert shares[-1] == 0.8


def test_one_persona_or_many() -> None:
    one = attacker("a", CAMPAIGN, Mixing(share=0.1, cover="same"), covers, 100, 0)
    many = attacker("a", CAMPAIGN, Mixing(share=0.1, cover="random"), covers, 100, 0)
    assert len({request.text.split()[0] for request in one.requests if not request.attack}) == 1
    assert len({request.text.split()[0] for request in many.requests if not request.attack}) == 2


def test_a_release_is_one_moment_for_all() -> None:
    mixing = Mixing(start="release", warm_up=20)
    moments = {attacker(name, CAMPAIGN, mixing, covers, 40, 0).requests[20].time for name in "abc"}
    assert max(moments) - min(moments) < 1e-3


def test_a_drip_is_slow() -> None:
    stream = attacker("a", CAMPAIGN, Mixing(start="drip", share=0.5), covers, 100, 0)
    days = (stream.requests[-1].time - stream.requests[0].time) / 86_400
    assert 100 / 20 * 0.7 < days < 100 * 1.5


def test_accounts_share_what_the_evidence_says() -> None:
    ring = campaign_accounts("r", CAMPAIGN, Mixing(share=0.5), covers, 8, 30, 0)
    assert len({stream.principal for stream in ring}) == 8
    assert len({dict(stream.links)["payment"] for stream in ring}) == 2
    assert len({dict(stream.links)["client"] for stream in ring}) == 1
    apart = campaign_accounts(
        "r",
        CAMPAIGN,
        Mixing(share=0.5),
        covers,
        8,
        30,
        0,
        Evidence(accounts_per_payment=1, proxies=False, one_client=False),
    )
    assert len({dict(stream.links)["payment"] for stream in apart}) == 8
    assert not any("proxy" in dict(stream.links)["network"] for stream in apart)


def test_accounts_divide_one_list_before_they_repeat_it() -> None:
    ring = campaign_accounts("r", CAMPAIGN, Mixing(), covers, 3, 10, 0)
    texts = [request.text for stream in ring for request in stream.requests]
    assert len(texts) == len(set(texts)) == 30


def test_an_organisation_pays_once() -> None:
    tenants = [Tenant(name=f"t{place}", kind="chat", families=[CHAT]) for place in range(3)]
    members = organisation("o", tenants, 20, 0)
    assert {dict(stream.links)["payment"] for stream in members} == {"o"}
    assert {stream.group for stream in members} == {"o"}


def test_drawing_on_keeps_the_beginning_and_adds_nothing_new() -> None:
    stream = Tenant(name="t", kind="chat", families=[CHAT, OTHER]).stream(30)
    longer = resampled(stream, 100, np.random.default_rng(0))
    assert longer.requests[:30] == stream.requests
    assert {request.text for request in longer.requests} == {request.text for request in stream.requests}
    assert len(longer) == 100
    times = [request.time for request in longer.requests]
    assert times == sorted(times)
