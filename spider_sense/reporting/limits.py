"""What a guard's numbers say in one line, and what they do not show."""

from collections.abc import Iterator, Sequence

from spider_sense.reporting.report import DetectorFacts, GuardFacts, Rate, System

__all__ = ["limits", "percent", "summary_line"]


def percent(rate: Rate | float | None) -> str:
    """Write a share as a percentage."""
    value = rate.value if isinstance(rate, Rate) else rate
    return "n/a" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "%"


def interval(rate: Rate) -> str:
    """Write the interval of a share, without brackets."""
    return "n/a" if rate.low is None or rate.high is None else f"{percent(rate.low)} to {percent(rate.high)}"


def summary_line(detector: DetectorFacts) -> str:
    """Say in one sentence what a detector is worth."""
    by_name = {system.name: system for system in detector.systems}
    guard, tfidf = by_name.get("guard"), by_name.get("tfidf")
    if guard is None or guard.tpr.value is None:
        return f"{detector.name}: this guard holds no test results."
    line = (
        f"{detector.name}: with 1% of benign prompts flagged it catches {percent(guard.tpr)} of the positives in its "
        f"test part (95% interval {interval(guard.tpr)})"
    )
    return f"{line}; TF-IDF catches {percent(tfidf.tpr)}." if tfidf is not None else f"{line}."


def limits(guard: GuardFacts, detectors: Sequence[DetectorFacts], serving: str) -> tuple[str, ...]:
    """Return sentences, the gravest first."""
    own = [f"{detector.name}: {text}" for detector in detectors for text in _of_detector(detector)]
    if serving not in guard.certified:
        own.insert(
            0, f"This report was made in {serving}, which the thresholds were not calibrated for: their rates are void."
        )
    tested = ", ".join(guard.test_sources) or "nothing"
    return (
        *own,
        f"Tested on: {tested}. Traffic of another kind (language, length, topic) may be flagged more often; "
        "calibrate on your own benign traffic.",
        "Nobody tried to evade this guard here. Whoever can query it, or read its weights, can search for wording "
        "that stays below the threshold.",
        "The colours show what the probe reads, not why the model answers as it does.",
    )


def _of_detector(detector: DetectorFacts) -> Iterator[str]:
    by_name: dict[str, System] = {system.name: system for system in detector.systems}
    if detector.warning:
        yield f"{detector.warning}."
    elif detector.beats_tfidf is False:
        yield "it does not beat TF-IDF by more than the interval: words alone may explain it."
    guard = by_name.get("guard")
    if guard is None:
        yield "no test results, so nothing is known about what it catches."
    else:
        negatives = detector.n - detector.positives
        yield (
            f"tested on {detector.positives} positive and {negatives} benign prompts; one benign prompt is "
            f"{percent(1 / negatives) if negatives else 'n/a'} of false positives, and no finer rate was measured. "
            "Answers were not read, in which a running maximum can only grow: rates in service are higher."
        )
    yield from _of_calibration(detector)


def _of_calibration(detector: DetectorFacts) -> Iterator[str]:
    calibration = detector.calibration
    weak = [bucket.breach for bucket in calibration.buckets if not bucket.breach.supported]
    if weak:
        yield (
            f"the breach thresholds rest on as few as {min(item.n for item in weak)} benign conversations; "
            f"“at most {percent(calibration.breach_fpr)}” needs {weak[0].needed}, so the rate in service may be higher."
        )
    pooled = sum(bucket.pooled for bucket in calibration.buckets)
    if pooled:
        yield (
            f"{pooled} of {len(calibration.buckets)} length buckets had too few conversations "
            "and share the thresholds of the whole set."
        )
    yield (
        f"calibrated on prompts of up to {calibration.horizon_tokens} tokens and responses of up to "
        f"{calibration.response_tokens}; a running maximum can only grow, so the false-positive rate of longer ones is "
        "unknown and higher."
    )
