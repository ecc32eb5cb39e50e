"""Builds the report from a guard folder and a model."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spider_sense.data import Example
from spider_sense.errors import GuardError
from spider_sense.fingerprint import ServingConfig, serving_config
from spider_sense.guard import Detector, Guard
from spider_sense.models import LoadedModel
from spider_sense.reporting.limits import limits, summary_line
from spider_sense.reporting.reading import read_conversations
from spider_sense.reporting.report import DetectorFacts, GuardFacts, Rate, Report, SweepPoint, System
from spider_sense.reporting.samples import samples
from spider_sense.signing import is_signed

__all__ = ["build_report", "detector_facts", "prompt_examples"]


def build_report(
    folder: Path,
    loaded: LoadedModel,
    examples: Sequence[Example] = (),
    origin: str = "",
    max_new_tokens: int = 48,
    allow_uncertified: bool = False,
    advance: Callable[[], None] | None = None,
) -> Report:
    """Read a guard, let the model answer under it, and gather everything that the page shows.

    Args:
        folder: the guard.
        loaded: the model it was made for.
        examples: prompts to show; by default pairs of the shipped corpus.
        origin: where they come from, in words.
        max_new_tokens: longest answer.
        allow_uncertified: accept another serving configuration than the guard was calibrated in.
        advance: called after each conversation.

    Raises:
        GuardError: if the guard cannot be read, or was made for another model.
        SpiderSenseError: if streamed and whole-sequence readouts disagree in float32.
    """
    guard = Guard.from_pretrained(folder)
    if not examples:
        examples, origin = samples(guard.manifest.training)
    conversations = read_conversations(guard, loaded, examples, max_new_tokens, allow_uncertified, advance)
    facts = _guard_facts(guard, folder)
    sweeps = guard.manifest.training.get("sweep", {})
    try:
        detectors = tuple(detector_facts(item, sweeps.get(item.name, ())) for item in guard.manifest.detectors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise GuardError(f"{folder}: evidence or sweep cannot be read ({error!r}); train the guard again") from error
    serving = _served(serving_config(loaded.model))
    return Report(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        guard=facts,
        detectors=detectors,
        serving=serving,
        origin=origin,
        conversations=conversations,
        summaries=tuple(map(summary_line, detectors)),
        limits=limits(facts, detectors, serving),
    )


def prompt_examples(prompts: Sequence[str]) -> list[Example]:
    """Turn prompts of the command line into rows without a label."""
    return [
        Example(id=f"prompt {n}", text=text, label="", category="", source="prompt", group=f"prompt {n}")
        for n, text in enumerate(prompts, start=1)
    ]


def detector_facts(record: Detector, swept: Sequence[Mapping[str, Any]]) -> DetectorFacts:
    """Read one detector's record and its part of the sweep."""
    overall: Mapping[str, Any] = record.evidence.get("overall", {})
    curves = overall.get("roc", {})
    # A system is whatever was summarised; the other entries are differences and rates.
    names = [name for name, part in overall.items() if isinstance(part, Mapping) and "auroc" in part]
    names.sort(key=lambda name: ("guard", "tfidf").index(name) if name in ("guard", "tfidf") else 2)
    gain = overall.get("tpr_gain_over_tfidf")
    return DetectorFacts(
        name=record.name,
        family=record.family,
        sites=record.sites,
        aggregator=record.aggregator.kind,
        calibration=record.calibration,
        systems=tuple(_system(name, overall[name], curves.get(name, ())) for name in names),
        n=overall["guard"]["n"] if names else 0,
        positives=overall["guard"]["positives"] if names else 0,
        gain=Rate(value=gain["mean"], low=gain["low"], high=gain["high"]) if gain else None,
        beats_tfidf=overall.get("beats_tfidf"),
        warning=overall.get("warning"),
        candidates=tuple(_swept(item, record) for item in swept),
    )


def _guard_facts(guard: Guard, folder: Path) -> GuardFacts:
    manifest = guard.manifest
    return GuardFacts(
        model=manifest.fingerprint.base_model,
        architecture=manifest.fingerprint.architecture,
        layers=manifest.fingerprint.layers,
        digest=guard.digest,
        certified=tuple(map(_served, manifest.certified)),
        signed=is_signed(folder),
        sources=tuple(manifest.training.get("sources", ())),
        test_sources=tuple(manifest.training.get("test_sources", ())),
    )


def _served(config: ServingConfig) -> str:
    adapters = f", adapters {', '.join(config.adapters)}" if config.adapters else ""
    return f"{config.dtype}{f', {config.quantization}' if config.quantization else ''}{adapters}"


def _system(name: str, part: Mapping[str, Any], curve: Sequence[Sequence[float]]) -> System:
    return System(
        name=name,
        auroc=part["auroc"],
        log_auroc=part["log_auroc"],
        tpr=Rate(**part["tpr_at_1pct_fpr"]),
        roc=tuple((fpr, tpr) for fpr, tpr in curve),
    )


def _swept(item: Mapping[str, Any], record: Detector) -> SweepPoint:
    sites = tuple(item["sites"])
    return SweepPoint(
        family=item["family"],
        sites=sites,
        tpr=item["tpr_at_1pct_fpr"],
        auroc=item["auroc"],
        chosen=item["family"] == record.family and set(sites) == set(record.sites),
    )
