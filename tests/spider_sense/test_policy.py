"""The policy: rules, severity, and failing closed."""

from itertools import pairwise
from pathlib import Path

import pytest

from spider_sense.config import load_yaml, parse
from spider_sense.decision import SEVERITY
from spider_sense.errors import ConfigError
from spider_sense.policy import Extraction, Patch, Policy, Rule, Steer, Throttle
from spider_sense.types import Action, Coverage, Verdict, Zone

TEXT = """
rules:
  - detector: misuse
    zone: breach
    action: throttle
  - {detector: "*", zone: breach, action: steer}
  - {detector: misuse, zone: suspect, action: escalate}
on_missing: patch
refusal: "No."
steer: {vector: refusal, strength: 4.0}
patch: {folder: patches/refusal}
"""


def verdict(detector: str, zone: Zone, missing: int = 0) -> Verdict:
    return Verdict(
        detector=detector,
        score=3.25,
        threshold=2.0,
        zone=zone,
        position=7,
        coverage=Coverage(scored=8, missing=missing),
    )


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return load_yaml(path, Policy)


def test_the_file_is_read(policy: Policy) -> None:
    assert policy.rules[0] == Rule(detector="misuse", zone="breach", action="throttle")
    assert policy.steer == Steer(vector="refusal", strength=4.0)
    assert policy.patch == Patch(folder=Path("patches/refusal"), alpha=None)
    assert (policy.on_missing, policy.refusal) == ("patch", "No.")


def test_the_first_rule_that_matches_counts(policy: Policy) -> None:
    decision = policy.decide([verdict("misuse", "breach")])
    assert decision.action == "throttle"
    assert decision.reason == "misuse breach: rule 1 (misuse, breach) says throttle"
    assert policy.decide([verdict("injection", "breach")]).action == "steer"


def test_the_strictest_action_of_all_verdicts_is_taken(policy: Policy) -> None:
    mild, strict = verdict("misuse", "breach"), verdict("misuse", "suspect")
    for verdicts in ([mild, strict], [strict, mild]):
        decision = policy.decide(verdicts)
        assert decision.action == "escalate"
        assert decision.verdict is strict


@pytest.mark.parametrize(("milder", "stricter"), list(pairwise(SEVERITY)))
def test_each_action_beats_the_one_before(milder: Action, stricter: Action) -> None:
    policy = Policy(
        rules=(
            Rule(detector="a", zone="breach", action=milder),
            Rule(detector="b", zone="breach", action=stricter),
        ),
        steer=Steer(vector="refusal", strength=1.0),
        patch=Patch(),
        extraction=Extraction(limit="flag", act="stop"),
    )
    assert policy.decide([verdict("a", "breach"), verdict("b", "breach")]).action == stricter


def test_of_equally_strict_verdicts_the_first_is_named() -> None:
    first, second = verdict("a", "breach"), verdict("b", "breach")
    assert Policy.default().decide([first, second]).verdict is first


def test_a_breach_without_a_rule_is_stopped() -> None:
    policy = Policy(rules=(Rule(detector="other", zone="breach", action="observe"),))
    decision = policy.decide([verdict("misuse", "breach")])
    assert decision.action == "stop"
    assert "no rule matches, fails closed" in decision.reason


def test_a_suspect_without_a_rule_is_flagged() -> None:
    policy = Policy(rules=(Rule(detector="misuse", zone="breach", action="observe"),))
    assert policy.decide([verdict("misuse", "suspect")]).action == "flag"


def test_clear_verdicts_are_observed() -> None:
    decision = Policy.default().decide([verdict("misuse", "clear"), verdict("injection", "clear")])
    assert (decision.action, decision.verdict) == ("observe", None)


def test_a_hole_in_the_coverage_takes_on_missing(policy: Policy) -> None:
    decision = policy.decide([verdict("misuse", "clear", missing=3)])
    assert (decision.action, decision.reason) == ("patch", "misuse has not seen 3 tokens: on_missing says patch")
    assert Policy.default().decide([verdict("misuse", "clear", missing=1)]).action == "stop"


def test_a_lenient_on_missing_does_not_excuse_a_breach() -> None:
    policy = Policy(rules=(Rule(detector="*", zone="breach", action="stop"),), on_missing="observe")
    assert policy.decide([verdict("misuse", "breach", missing=5)]).action == "stop"


def test_no_verdict_at_all_takes_on_missing(policy: Policy) -> None:
    assert policy.decide([]).action == "patch"
    assert Policy.default().decide([]).action == "stop"


def test_a_reason_tells_no_score() -> None:
    policy = Policy.default()
    for zone in ("suspect", "breach"):
        assert "3.25" not in policy.decide([verdict("misuse", zone, missing=1)]).reason


@pytest.mark.parametrize(("zone", "action"), [("breach", "stop"), ("suspect", "flag"), ("clear", "observe")])
def test_the_default_policy(zone: Zone, action: Action) -> None:
    assert Policy.default().decide([verdict("any", zone)]).action == action


@pytest.mark.parametrize("zone", ["breach", "suspect", "clear"])
@pytest.mark.parametrize("missing", [0, 9])
def test_the_shadow_policy_never_acts(zone: Zone, missing: int) -> None:
    assert Policy.shadow().decide([verdict("any", zone, missing)]).action == "observe"
    assert Policy.shadow().decide([]).action == "observe"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"rules": [{"detector": "misuse", "zone": "breach", "action": "block"}]},
            "policy.yaml: rules.0.action: 'block' is not allowed; input should be 'observe', 'flag', 'steer', 'patch',"
            " 'escalate', 'stop', 'throttle', 'verify' or 'omit_reasoning'",
        ),
        ({"rules": [], "on_missing": "ignore"}, "policy.yaml: on_missing: 'ignore' is not allowed; input should be"),
        (
            {"rules": [{"detector": "misuse", "zone": "clear", "action": "stop"}]},
            "policy.yaml: rules.0.zone: 'clear' is not allowed; input should be 'suspect' or 'breach'",
        ),
        (
            {"rules": [{"detector": "*", "zone": "breach", "action": "steer"}]},
            "policy.yaml: rules.0.action: 'steer' needs a vector; add a section steer:",
        ),
        ({"rules": [], "on_missing": "steer"}, "policy.yaml: on_missing: 'steer' needs a vector"),
        (
            {"rules": [{"detector": "*", "zone": "suspect", "action": "patch"}]},
            "policy.yaml: rules.0.action: 'patch' needs a patch; add a section patch:",
        ),
        ({"rules": [], "on_missing": "patch"}, "policy.yaml: on_missing: 'patch' needs a patch"),
        (
            {"rules": [], "on_missing": "omit_reasoning"},
            "policy.yaml: on_missing: 'omit_reasoning' needs a section extraction, which says how long it lasts",
        ),
        (
            {"rules": [], "patch": {"folder": 3}},
            "policy.yaml: patch.folder: 3 is not allowed; input should be a valid string",
        ),
        (
            {"rules": [], "patch": {"alpha": float("inf")}},
            "policy.yaml: patch.alpha: inf is not allowed; input should be a finite number",
        ),
        ({"rules": [], "patch": {"path": "p"}}, "policy.yaml: unknown key 'patch.path'; Known: alpha, begin, folder"),
        ({"on_missing": "stop"}, "policy.yaml: the key 'rules' is missing"),
        ({"rules": [], "refusl": "No."}, "policy.yaml: unknown key 'refusl'; did you mean 'refusal'?"),
        (
            {"rules": [], "steer": {"vector": "refusal", "strength": float("nan")}},
            "policy.yaml: steer.strength: nan is not allowed; input should be a finite number",
        ),
    ],
)
def test_a_wrong_policy_is_refused(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(mapping, Policy, origin="policy.yaml")
    assert message in str(caught.value)


def test_a_throttle_has_a_pace_of_its_own() -> None:
    rule = {"detector": "*", "zone": "suspect", "action": "throttle"}
    assert parse({"rules": [rule]}, Policy, "x").throttle == Throttle(requests=6, per_seconds=60, for_seconds=600)
    slow = parse({"rules": [rule], "throttle": {"requests": 1, "for_seconds": 60}}, Policy, "x")
    assert slow.throttle == Throttle(requests=1, per_seconds=60, for_seconds=60)
    with pytest.raises(ConfigError, match=r"throttle\.requests: 0 is not allowed; input should be greater than 0"):
        parse({"rules": [rule], "throttle": {"requests": 0}}, Policy, "x")
    with pytest.raises(ConfigError, match=r"unknown key 'throttle\.seconds'"):
        parse({"rules": [rule], "throttle": {"seconds": 5}}, Policy, "x")


@pytest.mark.parametrize(
    ("mapping", "again"),
    [
        ({"rules": [{"detector": "*", "zone": "suspect", "action": "patch"}], "patch": {"begin": "prompt"}}, True),
        ({"rules": [{"detector": "*", "zone": "suspect", "action": "patch"}], "patch": {}}, False),
        # Nothing asks for the patch, so nothing waits for a verdict on a prompt.
        ({"rules": [{"detector": "*", "zone": "suspect", "action": "stop"}], "patch": {"begin": "prompt"}}, False),
        ({"rules": []}, False),
    ],
)
def test_prompts_are_read_again_only_where_the_policy_patches(mapping: dict[str, object], again: bool) -> None:
    assert parse(mapping, Policy, origin="policy.yaml").reads_again is again
