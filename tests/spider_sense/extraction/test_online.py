"""What is opened where a model is served, and what operators do to the store; what is wrong is said at the start."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sense.cli.principals import principals as cli
from spider_sense.config import load_yaml, parse
from spider_sense.errors import ConfigError, DataError, MismatchError, SpiderSenseError
from spider_sense.extraction import Event, Key, PrincipalState
from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.fitting import calibrate, fit
from spider_sense.extraction.groups import linked
from spider_sense.extraction.layout import LinkKind
from spider_sense.extraction.online import heads_of, open_claimed, open_watch, read_artifact
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.extraction.simulator.noise import noise_rows
from spider_sense.extraction.standing import decision_of, text_of
from spider_sense.extraction.stores import Change, Entry, StoreError, open_store
from spider_sense.extraction.thresholds import Budget
from spider_sense.models import LoadedModel
from spider_sense.types import Site

KEY, WIDTH = b"sixteen bytes at least", 80


def keep(state: bytes, standing: str = "") -> Change:
    return lambda old: Entry(state, standing)


@pytest.fixture(scope="module")
def fitted() -> Artifact:
    return fit(
        noise_rows("a", 40, 40, WIDTH),
        noise_rows("bb", 20, 128, WIDTH, "mining"),
        Key(KEY),
        Site(1, "resid"),
        width=WIDTH,
    )


@pytest.fixture(scope="module")
def artifact(fitted: Artifact) -> Artifact:
    return calibrate(fitted, noise_rows("ccc", 40, 20, WIDTH), Key(KEY))


@pytest.fixture
def config(artifact: Artifact, tmp_path: Path) -> Path:
    """A YAML file as a server is told."""
    artifact.save_pretrained(tmp_path / "extraction")
    (tmp_path / "key").write_bytes(KEY)
    names = {"detector": "extraction", "key": "key", "store": "store"}
    told = {name: str(tmp_path / place) for name, place in names.items()}
    (tmp_path / "extraction.yaml").write_text(json.dumps(told))
    return tmp_path / "extraction.yaml"


@pytest.fixture
def settings(config: Path) -> ExtractionSettings:
    return load_yaml(config, ExtractionSettings)


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a verb of ``spider-sense principals`` and returns what it prints."""

    def command(verb: str, *names: str) -> str:
        cli([verb, "--extraction", str(config), *names], standalone_mode=False)
        return capsys.readouterr().out

    return command


def test_a_watch_reads_folds_and_keeps(
    settings: ExtractionSettings, artifact: Artifact, tiny_loaded: LoadedModel, helpers: Any
) -> None:
    watch = open_watch(settings, tiny_loaded.tokenizer)
    assert len(watch.probes) == len(heads_of(artifact)) == 64 + 2
    seen = replace(helpers.seen("ann"), reading=lambda: np.zeros(65, np.float32))
    for _ in range(20):
        watch.feed.offer(seen)
    assert watch.feed.flush()
    assert watch.feed.counts.totals == {"folded": 20}
    watch.feed.close()
    again = open_claimed(settings, artifact)
    assert len(again) == 1
    again.close()


def test_new_thresholds_keep_the_states_and_another_guard_does_not(
    settings: ExtractionSettings, artifact: Artifact, fitted: Artifact, tmp_path: Path
) -> None:
    open_claimed(settings, artifact).close()
    other = calibrate(
        fitted, noise_rows("dddd", 40, 20, WIDTH), Key(KEY), budget=Budget(own=0.001, level=0.001, group=0.001)
    )
    open_claimed(settings, other).close()
    open_claimed(settings, replace(artifact, fitted=frozenset())).close()
    moved = replace(artifact, sketch=replace(artifact.sketch, mean=artifact.sketch.mean + 1))
    with pytest.raises(StoreError, match="by another extraction guard"):
        open_claimed(settings, moved)


def test_what_is_wrong_is_said_at_the_start(
    settings: ExtractionSettings, fitted: Artifact, artifact: Artifact, tiny_loaded: LoadedModel, tmp_path: Path
) -> None:
    fitted.save_pretrained(tmp_path / "uncalibrated")
    with pytest.raises(ConfigError, match="spider-sense extraction calibrate"):
        read_artifact(settings.model_copy(update={"detector": tmp_path / "uncalibrated"}))
    (tmp_path / "other").write_bytes(b"another key of some bytes")
    with pytest.raises(MismatchError, match="the key is"):
        open_watch(settings.model_copy(update={"key": tmp_path / "other"}), tiny_loaded.tokenizer)
    with pytest.raises(SpiderSenseError, match="nowhere"):
        read_artifact(settings.model_copy(update={"detector": tmp_path / "nowhere"}))
    with pytest.raises(StoreError, match="make its folder"):
        open_watch(settings.model_copy(update={"store": str(tmp_path / "none" / "store")}), tiny_loaded.tokenizer)


def test_a_calibration_on_requests_that_nobody_read_is_refused(fitted: Artifact) -> None:
    rows = [row.model_copy(update={"hidden": None, "text": "Hello"}) for row in noise_rows("ccc", 40, 20, WIDTH)]
    with pytest.raises(DataError, match="40 of 40 honest principals have no activations"):
        calibrate(fitted, rows, Key(KEY))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tenants": {"ann": "Behörde"}}, "tenants.ann"),
        ({"linked": [["ann", "x" * 600]]}, "cannot be a principal's name"),
    ],
)
def test_settings_that_no_request_could_be_read_by_are_refused(
    settings: ExtractionSettings, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(settings.model_dump(mode="json") | change, ExtractionSettings, "extraction.yaml")


@pytest.mark.parametrize("verb", ["clear", "link", "unlink", "erase"])
def test_a_name_that_cannot_be_kept_is_an_error_in_words(
    run: Callable[..., str], settings: ExtractionSettings, verb: str
) -> None:
    open_store(settings.store).close()
    with pytest.raises(SpiderSenseError, match="cannot be a principal's name"):
        run(verb, "x" * 600)


def test_operators_see_clear_link_and_erase(
    run: Callable[..., str], settings: ExtractionSettings, helpers: Any
) -> None:

    store = open_store(settings.store)
    state = helpers.Counting().open("ann").to_bytes()
    for name in ("ann", "bob"):
        store.update({name: keep(state, text_of(helpers.decision(name, "act")))})
    said = run("list")
    assert "ann  act by own, 1970-01-01 00:16, request 1: its requests changed" in said
    assert "2 principals are kept" in said
    assert "1 of 2 principals are gone" in run("clear", "ann", "nobody")
    assert "ann " not in run("list")
    assert "linked: ann, bob, cid" in run("link", "ann", "bob", "cid")
    assert "1 of 2 principals are erased" in run("erase", "bob", "nobody")
    assert store.linked("ann") == {"ann", "cid"}
    assert "1 principals, 0 found" in run("review")
    store.close()


@pytest.mark.parametrize("verb", ["list", "review", "clear", "link", "unlink", "erase", "expire"])
def test_a_store_that_is_not_there_is_not_made_by_operators(
    run: Callable[..., str], settings: ExtractionSettings, verb: str
) -> None:
    with pytest.raises(StoreError, match="store holds no store of principals"):
        run(verb, *(["ann"] if verb not in ("list", "review", "expire") else []))
    assert not Path(settings.store).exists()


def test_an_operator_vouches_for_the_clock_after_a_long_pause(
    config: Path, run: Callable[..., str], settings: ExtractionSettings, artifact: Artifact, helpers: Any
) -> None:
    store, state = open_claimed(settings, artifact), helpers.Counting().open("ann").to_bytes()
    store.update({"ann": keep(state)}, seen=time.time() - 91 * 86_400)
    store.update({"bob": keep(state)}, seen=time.time() - 89 * 86_400)
    assert re.match(r"1 principals, not seen since \d{4}-\d\d-\d\d \d\d:\d\d, are erased; 1 are kept", run("expire"))
    store.close()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"retention_days": None}))
    with pytest.raises(ConfigError, match="keeps everybody for good: `retention_days` is null"):
        run("expire")


def test_a_principal_that_was_found_twice_has_one_line(
    run: Callable[..., str], settings: ExtractionSettings, helpers: Any
) -> None:
    store, state = open_store(settings.store), helpers.Counting().open("ann").to_bytes()
    store.update({"ann": keep(state, text_of(helpers.decision("ann", "watch", "level")))})
    store.mark_groups({"ann": text_of(helpers.decision("ann", "limit", "group"))})
    (line,) = [line for line in run("list").splitlines() if line.startswith("ann")]
    assert "ann  limit by group" in line
    assert "also watch by level" in line
    store.close()


def test_a_link_to_a_name_that_nothing_is_kept_of_is_warned_about(
    config: Path, settings: ExtractionSettings, capsys: pytest.CaptureFixture[str], helpers: Any
) -> None:
    store = open_store(settings.store)
    store.update({name: keep(helpers.Counting().open(name).to_bytes()) for name in ("ann", "bob")})
    cli(["link", "--extraction", str(config), "ann", "bob"], standalone_mode=False)
    assert capsys.readouterr().err == ""
    cli(["link", "--extraction", str(config), "ann", "bbo"], standalone_mode=False)
    assert "nothing is kept of 'bbo': if a name is mistyped" in capsys.readouterr().err
    store.close()


@pytest.mark.parametrize(
    ("verb", "says"),
    [("clear", "nothing was found about"), ("unlink", "nobody is linked with"), ("erase", "nothing is kept of")],
)
def test_names_that_a_verb_does_not_find_are_named(
    config: Path, settings: ExtractionSettings, capsys: pytest.CaptureFixture[str], helpers: Any, verb: str, says: str
) -> None:
    store = open_store(settings.store)
    store.update({"ann": keep(helpers.Counting().open("ann").to_bytes(), text_of(helpers.decision("ann", "act")))})
    store.link(["ann", "bob"])
    cli([verb, "--extraction", str(config), "ann", "nobody", "anne"], standalone_mode=False)
    told = capsys.readouterr()
    assert "1 of 3 principals" in told.out
    assert f"warning: {says} 'nobody', 'anne'; write names as the audit log does" in told.err
    store.close()


def test_the_lines_that_feed_a_store_without_a_server_do(
    run: Callable[..., str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "extraction.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from spider_sense.config .*?)```", page, re.DOTALL)
    folder = config.parent
    (folder / "configs").mkdir()
    config.rename(folder / "configs" / "extraction.yaml")
    rows = noise_rows("bb", 2, 40, WIDTH, "mining")
    (folder / "traffic.jsonl").write_text("\n".join(row.model_dump_json() for row in rows))
    monkeypatch.chdir(folder)
    for _ in range(2):
        exec(lines, {})
    (folder / "configs" / "extraction.yaml").rename(config)
    said = run("list")
    assert "2 principals are kept" in said
    assert "bb 0  watch by level" in said
    store = open_store(load_yaml(config, ExtractionSettings).store)
    assert {PrincipalState.from_bytes(data).count for _, data in store.principals()} == {80}
    store.close()


def test_a_link_takes_two_names(run: Callable[..., str], settings: ExtractionSettings) -> None:
    open_store(settings.store).close()
    for names in (["ann"], ["ann", "ann"]):
        with pytest.raises(ConfigError, match="a link takes two different names, and 'ann' is one"):
            run("link", *names)


def test_who_is_unlinked_is_one_of_no_group_any_more(
    run: Callable[..., str], settings: ExtractionSettings, artifact: Artifact
) -> None:
    """The states hold what the link was folded as."""
    detector, declared = artifact.detector(Key(KEY)), Key(KEY).hash("declared", "ann")
    store = open_claimed(settings, artifact)
    for name in ("ann", "bob", "cid"):
        event = Event(principal=name, time=1.0, links=(("declared", declared), ("client", 7)))
        store.update({name: keep(detector.update(detector.open(name), event)[0].to_bytes(), "standing")}, seen=1000.0)
    store.link(["ann", "bob", "cid"])
    assert "1 of 2 principals are unlinked" in run("unlink", "bob", "nobody")
    assert store.linked("ann") == {"ann", "cid"}
    states = {name: PrincipalState.from_bytes(data) for name, data in store.principals()}
    (group,) = linked(states, artifact.population)
    assert group.members == ("ann", "cid")
    assert states["bob"].count == 1
    assert dict(store.standings())["bob"] == "standing"
    assert store.expire(1001.0) == 3, "nobody is kept for longer"
    store.close()


def test_a_damaged_state_is_unlinked_as_far_as_that_goes(
    run: Callable[..., str], settings: ExtractionSettings, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(settings.store)
    store.update({"ann": keep(b"damaged")})
    store.link(["ann", "bob"])
    cli(["unlink", "--extraction", str(config), "ann", "bob"], standalone_mode=False)
    told = capsys.readouterr()
    assert "2 of 2 principals are unlinked" in told.out
    assert "'ann' keeps the link in its state: 7 bytes" in told.err
    assert store.read("ann") == b"damaged"
    assert store.linked("ann") == {"ann"}
    store.close()


def test_who_is_linked_by_the_settings_is_not_unlinked_from_the_store(
    run: Callable[..., str], config: Path, settings: ExtractionSettings
) -> None:
    open_store(settings.store).close()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"linked": [["ann", "bob"]]}))
    with pytest.raises(ConfigError, match="links ann: take them out of `linked`"):
        run("unlink", "ann", "cid")


def test_a_damaged_state_hides_nobody_else_from_a_review(
    run: Callable[..., str], settings: ExtractionSettings, capsys: pytest.CaptureFixture[str], helpers: Any
) -> None:
    store = open_store(settings.store)
    store.update({"ann": keep(b"damaged"), "bob": keep(helpers.Counting().open("bob").to_bytes())})
    store.mark_groups({name: text_of(helpers.decision(name, "limit")) for name in ("ann", "bob")})
    cli(["review", "--extraction", str(settings.detector.parent / "extraction.yaml")], standalone_mode=False)
    told = capsys.readouterr()
    assert told.out.startswith("1 principals, 2 found")
    assert "'ann' is left out" in told.err
    assert {name for name, _ in store.standings()} == {"ann", "bob"}, "what was found earlier stands"
    store.close()


def test_a_damaged_standing_hides_no_other(
    run: Callable[..., str],
    settings: ExtractionSettings,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    helpers: Any,
) -> None:
    store, state = open_store(settings.store), helpers.Counting().open("ann").to_bytes()
    store.update({"ann": keep(state, "damaged"), "bob": keep(state, text_of(helpers.decision("bob", "act")))})
    store.update({"cid": keep(b"damaged")})
    for verb in ("list", "review"):
        cli([verb, "--extraction", str(config)], standalone_mode=False)
        told = capsys.readouterr()
        assert "'ann' is left out: 'damaged' is no standing" in told.err
        assert ("bob  act" if verb == "list" else "2 principals, 1 found") in told.out
    assert "1 of 1" in run("clear", "ann")
    store.close()


def test_a_review_keeps_what_it_cannot_read(
    run: Callable[..., str], settings: ExtractionSettings, helpers: Any
) -> None:
    store, state = open_store(settings.store), helpers.Counting().open("ann").to_bytes()
    store.update({"ann": keep(state), "cid": keep(b"damaged")})
    store.mark_groups({"ann": "damaged"})
    run("review")
    assert list(store.standings()) == [("ann", "damaged")], "so that ann stays unknown"
    store.close()


def test_a_review_finds_a_group_and_servers_hear_of_it(
    run: Callable[..., str], settings: ExtractionSettings, artifact: Artifact
) -> None:
    """Six keys of one owner, and requests far from everybody's."""
    key, detector = Key(KEY), artifact.detector(Key(KEY))
    store = open_claimed(settings, artifact)
    links: tuple[tuple[LinkKind, int], ...] = (("declared", key.hash("declared", "one owner")),)
    for member in range(6):
        name, state = f"ring {member}", detector.open(f"ring {member}")
        for number in range(32):
            sketch = np.full(64, 3.0, np.float32)
            event = Event(
                principal=name, time=60.0 * number, sketch=sketch, probes=np.full(1, 6.0, np.float32),
                links=links,
            )  # fmt: skip
            state, _ = detector.update(state, event)
        store.update({name: keep(state.to_bytes())})
    said = run("review")
    assert said.startswith("6 principals, 6 found by their groups")
    assert "group, watch: ring 0, ring 1, ring 2, ring 3, ring 4, ring 5\n" in said
    found = {name: decision_of(text) for name, text in store.standings()}
    assert set(found) == {f"ring {member}" for member in range(6)}
    # 40 principals calibrate no threshold, so nobody is limited.
    assert {(one.tier, one.level) for one in found.values()} == {("group", "watch")}
    store.close()
