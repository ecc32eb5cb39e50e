"""The table of the comparison."""

from typing import Any

from rich.console import Console

from nest.cli.bench_table import arms_table


def arm(asr: float, **more: Any) -> dict[str, Any]:
    names = ("asr_jailbreak", "over_refusal", "over_refusal_borderline", "utility", "perplexity", "kl")
    figures = {**dict.fromkeys(names), "asr": asr, "intervals": {"asr": [asr - 0.1, asr + 0.1]}}
    about = {"runs": 3, "sd": {"asr": 0.031}, "trained_share": 0.0005, "patch_bytes": 2048.0, "seconds": 60.0}
    return {**figures, **about, **more}


def test_an_arm_stands_above_its_difference_from_nest() -> None:
    differs = {"asr": {"value": 0.125, "low": -0.05, "high": 0.25}}
    differs["perplexity"] = {"value": -0.03, "low": -0.041, "high": -0.02}
    console = Console(width=200)
    with console.capture() as captured:
        console.print(arms_table({"nest": arm(0.3), "random_rows": arm(0.425, versus_nest=differs)}))
    lines = captured.get().splitlines()
    at = next(place for place, line in enumerate(lines) if "random_rows" in line)
    assert "42.5 (32.5-52.5)" in lines[at]
    assert "3.1" in lines[at].split()
    assert "+12.5 (-5.0, +25.0)" in lines[at + 1]
    assert "-3.0% (-4.1%, -2.0%)" in lines[at + 1], "a relative change, not points"
    assert "+" not in lines[at - 1], "nest itself has no second line"
    assert "2" in lines[at].split()
