"""All seeds and embeddings, kept on disk: a bench that is cut off goes on with what is missing."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from spider_sense.extraction.bench.adaptive import adaptive_outcomes
from spider_sense.extraction.bench.config import BenchConfig, Cell, Embedding
from spider_sense.extraction.bench.embeddings import text_embedding
from spider_sense.extraction.bench.features import Features, cached_features
from spider_sense.extraction.bench.load import load_figures
from spider_sense.extraction.bench.logit_sweep import sweep_figures
from spider_sense.extraction.bench.outcome import Outcome, read_outcomes, write_outcomes
from spider_sense.extraction.bench.rings import group_outcomes
from spider_sense.extraction.bench.scene import Scene
from spider_sense.extraction.bench.seed_run import Material, SeedRun, benign_scenes
from spider_sense.extraction.bench.systems import System
from spider_sense.extraction.bench.texts import every_text, load_material
from spider_sense.extraction.bench.windows import Windows, mmd_rates, score_rates
from spider_sense.extraction.simulator.traffic import texts_of
from spider_sense.types import Site

__all__ = ["Results", "run_bench"]

Say = Callable[[str], None]

_VOCABULARY = 49_152
"""Of SmolLM2, whose output matrix the sweeps are after."""
_WINDOWS = (100, 1500)


@dataclass(frozen=True)
class Results:
    """Everything that a bench found."""

    outcomes: list[Outcome]
    figures: dict[str, Any] = field(default_factory=dict)
    """What is no stream: adaptive attackers' losses, sweeps, windows, cost."""


def run_bench(config: BenchConfig, say: Say) -> Results:
    """Run what is missing and return all.

    Args:
        config: what to compare.
        say: is told what is going on.
    """
    # Seeds are not in the name: more of them go on from those that are there.
    decided = config.model_dump_json(exclude={"output", "seeds"})
    folder = config.output / hashlib.sha256(decided.encode()).hexdigest()[:12]
    families, people = load_material(config)
    texts = every_text(config, families, people)
    say(f"{len(texts)} texts of {len(families)} families and {len(people)} real people")
    features = cached_features(
        config.model, Site.parse(config.site), texts, advance=lambda count: say(f"{count} texts read by {config.model}")
    )
    outcomes: list[Outcome] = []
    figures: dict[str, Any] = {}
    main, *others = config.embeddings
    parts = [(seed, main) for seed in config.seeds] + [(config.seeds[0], embedding) for embedding in others]
    for seed, embedding in parts:
        run: SeedRun | None = None
        for stage in _wanted(config, seed, embedding):
            part = folder / f"seed{seed}-{embedding}-{stage}"
            if not part.with_suffix(".json").exists():
                say(f"seed {seed}, {embedding}, {stage}")
                if run is None:
                    scene = Scene(config, families, people, seed)
                    run = SeedRun(scene, _material(texts, features, embedding, scene), embedding)
                found, numbers = _STAGES[stage](run)
                write_outcomes(part.with_suffix(".jsonl"), found)
                part.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")
            outcomes += read_outcomes(part.with_suffix(".jsonl"))
            figures |= json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
    return Results(outcomes, figures)


def _material(texts: list[str], features: Features, embedding: Embedding, scene: Scene) -> Material:
    vectors_ND = features.hidden_ND
    if embedding != "hidden":
        vectors_ND = text_embedding(embedding, texts, texts_of(scene.benign("fit")))
    return Material(features.index, {embedding: vectors_ND})


def _wanted(config: BenchConfig, seed: int, embedding: Embedding) -> Iterator[str]:
    """Yield what is measured of a seed and an embedding."""
    main, first = embedding == config.embeddings[0], seed == config.seeds[0]
    yield "ours"
    if embedding in config.baselines:
        yield "baselines"
    if main:
        yield "groups"
    if main and config.horizon:
        yield "horizon"
    if main and config.late:
        yield "late"
    if main and first and config.adaptive:
        yield "adaptive"
    if main and first:
        yield from ("sweep", "load")
    if config.own_protocol and first and embedding != "tfidf":
        yield "windows"


Found = tuple[list[Outcome], dict[str, Any]]


def _ours(run: SeedRun) -> Found:
    return _streams(run, run.ours), {}


def _baselines(run: SeedRun) -> Found:
    return [one for system in run.baselines() for one in _streams(run, system)], {}


def _groups(run: SeedRun) -> Found:
    return group_outcomes(run.scene, run.ours), {}


def _streams(run: SeedRun, system: System) -> list[Outcome]:
    found: list[Outcome] = []
    for name, streams, begin in benign_scenes(run.scene):
        found += run.outcomes(system, name, streams, begin)
    for cell in run.config.cells:
        found += run.outcomes(system, cell.name, run.scene.attackers(cell))
    return found


def _horizon(run: SeedRun) -> Found:
    """Calibrate and test again on streams that are drawn on to the horizon."""
    scene = run.scene
    long = run.calibrated(scene.drawn_on(run.calibration))
    return run.outcomes(long, f"drawn on to {run.config.horizon}", scene.drawn_on(scene.benign("test"))), {}


def _late(run: SeedRun) -> Found:
    """Let old accounts turn, to campaigns and to other innocent work, at thresholds of the usual lives."""
    late = run.config.late
    scene = replace(run.scene, config=run.config.model_copy(update={"warm_up": late}))
    cells = [Cell(share=share, start="pivot") for share in (1.0, 0.5)]
    found: list[Outcome] = []
    for cell in cells:
        found += run.outcomes(run.ours, f"{cell.name} after {late}", scene.attackers(cell))
    for name, streams in (("no attack", scene.without_attack(cells[0])), ("other work", scene.other_work())):
        found += run.outcomes(run.ours, f"{name} after {late}", streams, late)
    return found, {}


def _adaptive(run: SeedRun) -> Found:
    found = adaptive_outcomes(run, run.ours, run.encoder.sketch_NS, run.encoder.probes_NP.max(1))
    left = {name: attack["left"] for name, attack in found.items()}
    return [one for attack in found.values() for one in attack["outcomes"]], {"adaptive left": left}


def _sweep(run: SeedRun) -> Found:
    labelling = run.scene.split.families["test", "labelling"][0].texts
    width = run.material.vectors[run.embedding].shape[1]
    return [], {"sweep": sweep_figures(run.ours, list(labelling), _VOCABULARY, width, run.scene.seed)}


def _load(run: SeedRun) -> Found:
    events = [event for stream in run.calibration[::5] for event in run.encoder.events(stream)[:8]]
    return [], {"load": load_figures(run.ours.detector, events, run.config.load_principals)}


def _windows(run: SeedRun) -> Found:
    """Return what MMD finds in windows of both sizes, and this library's detector in the small ones."""
    benign = np.unique(run.material.rows(run.scene.benign("test") + run.calibration))
    campaigns = {
        family.name: np.array([run.material.index[text] for text in family.wrapped()])
        for family in run.scene.campaigns()
    }
    people = [np.array([run.material.index[text] for text in said]) for _, said in run.scene.split.people["test"]]
    found: dict[str, Any] = {}
    for window in _WINDOWS:
        windows = Windows.draw(benign, campaigns, people, window, run.scene.seed)
        found[str(window)] = mmd_rates(run.tracer.unit_ND, windows)
        if window == min(_WINDOWS):
            found[f"{window} {run.ours.name}"] = score_rates(
                partial(run.ours.windows, list(run.material.index)), windows
            )
    return [], {f"windows {run.embedding}": found}


_STAGES: Mapping[str, Callable[[SeedRun], Found]] = {
    "ours": _ours,
    "baselines": _baselines,
    "groups": _groups,
    "horizon": _horizon,
    "late": _late,
    "adaptive": _adaptive,
    "sweep": _sweep,
    "load": _load,
    "windows": _windows,
}
