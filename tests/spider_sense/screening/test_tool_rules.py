"""Rules over tool calls: what they ask for, and that no argument can switch one off."""

from pathlib import Path
from typing import Any

import pytest

from spider_sense.config import load_yaml, parse
from spider_sense.errors import ConfigError
from spider_sense.screening.settings import ScreenSettings
from spider_sense.screening.tool_policy import ToolPolicy
from spider_sense.screening.tool_rules import Ruling, ToolRules

pytest.importorskip("cedarpy")

CONFIG = Path(__file__).parents[3] / "configs" / "screen.yaml"
TYPES = "an argument that a rule reads is missing, or not of the type that it expects"


def rules(*lines: dict[str, Any], default: str = "allow", **more: Any) -> ToolRules:
    return ToolRules(parse({"rules": list(lines), "default": default, **more}, ToolPolicy, "test"))


def deny(**conditions: Any) -> ToolRules:
    return rules({"tool": "pay", "when": {"x": conditions}, "then": "deny"})


def denied(rules: ToolRules, **arguments: Any) -> str | None:
    return rules.decide("ann", "pay", arguments, "clear").deny


def test_the_shipped_file_says_what_its_comments_say() -> None:
    tools = load_yaml(CONFIG, ScreenSettings).tools
    assert tools is not None
    shipped = ToolRules(tools)
    assert shipped.decide("ann", "search", {"q": "x"}, "clear") == Ruling()
    assert shipped.decide("ann", "other", {}, "clear") == Ruling(check="default")
    for path in ("/etc/passwd", "//etc/passwd", "notes.md/../../etc/passwd", "Notes.md"):
        assert shipped.decide("ann", "read_file", {"path": path}, "clear").deny == "rule 3 (read_file)"
    assert shipped.decide("ann", "read_file", {"path": "notes.md"}, "clear") == Ruling()
    over = shipped.decide("ann", "send_money", {"amount": 1000.01}, "clear")
    assert over == Ruling(check="default", ask="rule 4 (send_money)")
    assert shipped.decide("ann", "send_money", {"amount": 1000}, "clear") == Ruling(check="default")
    for to in ("eve@elsewhere.org", "evil@x.com, team@example.org", "team@example.org\n"):
        assert shipped.decide("ann", "send_email", {"to": to}, "clear") == Ruling(ask="rule 6 (send_email)")
    assert shipped.decide("ann", "send_email", {}, "clear").ask == "rule 6 (send_email)"
    assert shipped.decide("ann", "send_email", {"to": "team@example.org"}, "clear") == Ruling()
    assert shipped.decide("guest-7", "search", {}, "suspect").deny == "rule 7 (*)"
    assert shipped.decide(None, "search", {}, "suspect") == Ruling()


@pytest.mark.parametrize(
    ("condition", "hit", "miss", "wrong"),
    [
        ({"above": 5}, 5.5, 5, "9"),
        ({"below": -1.5}, -2, -1.5, "-2"),
        ({"equals": 5}, 5.0, 6, "5"),
        ({"equals": "a*"}, "a*", "ab", 1),
        ({"equals": True}, True, False, "true"),
        ({"equals": False}, False, True, 0),
        ({"like": "a*z"}, "a/b\nz", "az.", ["az"]),
        ({"one_of": ["a", 'q"\\']}, 'q"\\', "b", None),
    ],
)
def test_conditions(condition: dict[str, Any], hit: Any, miss: Any, wrong: Any) -> None:
    found = deny(**condition)
    assert denied(found, x=hit) == "rule 1 (pay)"
    assert denied(found, x=miss) is None
    assert denied(found) is None
    assert denied(found, x=wrong) == TYPES


@pytest.mark.parametrize("number", [1e300, 10**30, 5.00001, -(10**20)])
def test_a_number_that_cannot_be_kept_is_no_way_around_a_bound(number: float) -> None:
    assert denied(deny(above=5), x=number) == TYPES
    assert denied(deny(like="x"), y=number) is None


@pytest.mark.parametrize(
    "value",
    [
        {"__extn": {"fn": "decimal", "arg": "0.0"}},
        {"__entity": {"type": "Tool", "id": "pay"}},
        [{"deep": {"__expr": "1"}}],
        "\ud800",
    ],
)
def test_what_cedar_would_read_in_its_own_way_is_denied(value: Any) -> None:
    ruling = deny(above=5).decide("ann", "pay", {"x": value}, "clear")
    assert ruling.deny is not None
    assert ruling.deny.startswith("the arguments cannot be put to the rules")


def test_deep_arguments_are_denied() -> None:
    value: Any = 1
    for _ in range(40):
        value = {"a": value}
    assert "nested more than 32 deep" in str(deny(above=5).decide("ann", "pay", {"x": value}, "clear").deny)


def test_nested_arguments_and_unless() -> None:
    nested = rules({"tool": "pay", "unless": {"to.bank": {"equals": "home"}}, "then": "deny"})
    assert denied(nested, to={"bank": "home"}) is None
    assert denied(nested, to={"bank": "away"}) == "rule 1 (pay)"
    assert denied(nested, to={}) == "rule 1 (pay)"
    assert denied(nested, to="home") == TYPES


def test_rules_add_up_and_name_themselves() -> None:
    both = rules({"tool": "p*", "then": "ask"}, {"tool": "pay", "then": "check"}, default="deny")
    assert both.decide(None, "pay", {}, "clear") == Ruling("default", ask="rule 1 (p*)", check="rule 2 (pay)")
    assert both.decide(None, "other", {}, "clear") == Ruling(deny="default")


def test_a_restriction_lifts_no_default() -> None:
    found = rules(
        {"tool": "*sh*", "principal": "guest-*", "then": "deny"},
        {"tool": "get_*", "then": "allow"},
        {"tool": "get_cash", "then": "ask"},
        default="deny",
    )
    assert found.decide("guest-7", "shell", {}, "clear").deny == "default, rule 1 (*sh*)"
    assert found.decide("ann", "shell", {}, "clear").deny == "default"
    assert found.decide("ann", "get_time", {}, "clear") == Ruling()
    assert found.decide("ann", "get_cash", {}, "clear") == Ruling(ask="rule 3 (get_cash)")


def test_a_rule_for_everything_names_nothing() -> None:
    assert rules({"tool": "*", "zones": ["breach"], "then": "deny"}, default="ask").decide(
        None, "pay", {}, "clear"
    ) == Ruling(ask="default")


def test_principals_cannot_break_out_of_their_name() -> None:
    guarded = rules({"tool": "*", "principal": 'a"b*', "then": "deny"})
    assert guarded.decide('a"b\n"c', "pay", {}, "clear").deny == "rule 1 (*)"
    assert guarded.decide("ab", 'x" || true', {}, "clear") == Ruling()


def test_rules_in_cedars_own_language(tmp_path: Path) -> None:
    file = tmp_path / "more.cedar"
    file.write_text(
        '@id("no scripts") forbid(principal, action == Action::"execute", resource == Tool::"run") '
        'when { context.signature == "injection" || context.arguments["script"] == "x" };'
    )
    found = rules(cedar=str(file))
    assert found.decide("ann", "run", {"script": "y"}, "clear", "injection").deny == "no scripts"
    assert found.decide("ann", "run", {"script": "y"}, "clear") == Ruling()
    # The rule reads an argument that is not there: Cedar would skip it.
    assert found.decide("ann", "run", {}, "clear").deny == TYPES
    file.write_text('forbid(principal, action, resource) when { context.zone == "breach" };')
    assert rules(cedar=str(file)).decide("ann", "run", {}, "breach").deny == "a rule without @id"
    file.write_text("forbid(")
    with pytest.raises(ConfigError, match=r"more\.cedar: not valid Cedar"):
        rules(cedar=str(file))
    with pytest.raises(ConfigError, match="name a file of Cedar rules"):
        rules(cedar=str(tmp_path / "none.cedar"))


@pytest.mark.parametrize(
    ("scope", "condition", "message"),
    [
        ('principal, action == Action::"exec", resource', "", 'unrecognized action `Action::"exec"`'),
        ("principal, action, resource == Tol::'run'", "", "unrecognized entity type `Tol`"),
        ("principal, action, resource == Principal::'run'", "", "unable to find an applicable action"),
        ("principal, action, resource == Tool::'rum'", "", "there is no tool 'rum'; did you mean 'run'"),
        ("principal, action, resource", "resource == Tool::'rum' || context.zone == 'clear'", "no tool 'rum'; did you"),
        ("principal, action, resource", "[Tool::'run', Tool::'fly'].contains(resource)", "no tool 'fly'; Known: run"),
        ("principal in Group::'x', action, resource", "", "unrecognized entity type `Group`"),
        ("principal == ?principal, action, resource", "", r"nobody fills in \?principal"),
        ("principal, action, resource", "context.zon == 'breach'", "attribute `zon` in context"),
        ("principal, action, resource", "!(context has zon)", "context never has 'zon'"),
        ("principal, action, resource", "principal.role == 'x'", "attribute `role` on entity type `Principal`"),
        ("principal, action, resource", "['suspect', 'breech'].contains(context.zone)", "never 'breech'; did you mean"),
        ("principal, action, resource", "context.signature == 'injektion'", "did you mean 'injection'"),
        ("principal, action, resource", "context.arguments has x && context.tool == 'rum'", "did you mean 'run'"),
        ("principal, action, resource", "context.arguments has x && principal.role == 'x'", "attribute `role`"),
        ("principal, action, resource", "context.signature == 'benign'", "never 'benign'"),
        ("principal, action, resource", "(context.zone == 'breech') == context.arguments.x", "never 'breech'"),
        ("principal, action, resource", "context.tool like 'rum*'", "context.tool is never like that; it is one of"),
        ("principal, action, resource", "!(context.zone like 'b.each')", "context.zone is never like that"),
        ("principal, action, resource", "context.arguments.x == 5", r'ever 5, .* write decimal\("5.0"\)'),
        ("principal, action, resource", "context.arguments has x && context.arguments.x == -5", "ever -5"),
        ("principal, action, resource", "[1, 2].contains(context.arguments.x)", "ever 1, .*ever 2"),
    ],
)
def test_a_rule_that_never_holds_is_refused(scope: str, condition: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "more.cedar"
    when = f" when {{ {condition} }}" if condition else ""
    file.write_text(f'@id("mine") forbid({scope}){when};'.replace("'", '"'))
    with pytest.raises(ConfigError, match=message):
        rules(cedar=str(file), known=["run"])


def test_a_fault_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "more.cedar"
    file.write_text('forbid(principal, action, resource) when { context.zon == "x" };')
    with pytest.raises(ConfigError) as caught:
        rules(cedar=str(file))
    assert str(caught.value).count("zon`") == 1
    file.write_text('forbid(principal, action, resource == Tool::"rum") when { resource == Tool::"rum" };')
    with pytest.raises(ConfigError) as caught:
        rules(cedar=str(file), known=["run"])
    assert str(caught.value).count("rum") == 1


@pytest.mark.parametrize(
    "condition",
    [
        'context.arguments has amount && context.arguments.amount.greaterThan(decimal("5.0"))',
        'if context.zone == "clear" then context.arguments.path like "/etc/*" else context has tool',
        'context.zone like "*ea*" || context.signature == ""',
        'context.tool like "r*" && context.arguments.path like "rum*"',
        '(context.tool == "run") != (context.zone == "clear")',
        'context.arguments.amount == decimal("5.0")',
        "context.arguments.dry_run",
    ],
)
def test_arguments_are_of_any_type_in_rules(condition: str, tmp_path: Path) -> None:
    file = tmp_path / "more.cedar"
    file.write_text(f"forbid(principal, action, resource) when {{ {condition} }};")
    assert rules(cedar=str(file), known=["run"]).text.endswith(file.read_text())


def test_a_rule_for_no_known_tool_is_an_error() -> None:
    known = ["search", "send_money"]
    rules({"tool": "send_*", "then": "ask"}, {"tool": "*", "then": "check"}, known=known)
    with pytest.raises(ConfigError, match=r"rule 2 is for 'send_mony', which is no known tool.*mean 'send_money'"):
        rules({"tool": "search", "then": "allow"}, {"tool": "send_mony", "then": "ask"}, known=known)
    # A dot stands for itself.
    with pytest.raises(ConfigError, match="is no known tool"):
        rules({"tool": "sea.ch", "then": "ask"}, known=known)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tool": "a", "then": "allow", "when": {"x": {"below": 5}}}, "allow takes no conditions"),
        ({"tool": "a", "then": "deny", "when": {"x": {}}}, "a condition is one of equals"),
        ({"tool": "a", "then": "deny", "when": {"x": {"above": 1, "below": 2}}}, "a condition is one of equals"),
        ({"tool": "a", "then": "deny", "when": {"x": {"over": 1}}}, "unknown key"),
        ({"tool": "a", "then": "forbid"}, "forbid"),
        ({"tool": "a", "then": "deny", "when": {"x": {"above": 1e30}}}, "a bound of 1e\\+30 cannot be kept"),
        ({"tool": "a", "then": "deny", "when": {"x": {"above": "5"}}}, "'5' is not allowed"),
    ],
)
def test_bad_rules(line: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules(line)
