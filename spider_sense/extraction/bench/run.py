"""All seeds and embeddings, kept on disk: a bench that is cut off goes on with what is missing."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from spider_sense.extraction.bench.adaptive import adaptive_outcomes
from spider_sense.extraction.bench.config import BenchConfig, Embedding
from spider_sense.extraction.bench.embeddings import text_embedding
from spider_sense.extraction.bench.features import Features, cached_features
from spider_sense.extraction.bench.load import load_figures
from spider_sense.extraction.bench.logit_sweep import sweep_figures
from spider_sense.extraction.bench.ours import Ours
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
    folder = config.output / hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
    families, people = load_material(config)
    texts = every_text(config, families, people)
    say(f"{len(texts)} texts of {len(families)} families and {len(people)} real people")
    features = cached_features(
        config.model, Site.parse(config.site), texts, advance=lambda count: say(f"{count} texts read by {config.model}")
    )
    outcomes: list[Outcome] = []
    figures: dict[str, Any] = {}
    for seed in config.seeds:
        scene = Scene(config, families, people, seed)
        for embedding in config.embeddings if seed == config.seeds[0] else config.embeddings[:1]:
            part = folder / f"seed{seed}-{embedding}"
            if not part.with_suffix(".json").exists():
                say(f"seed {seed}, {embedding}")
                run = SeedRun(scene, _material(texts, features, embedding, scene), embedding)
                found = list(_measured(run, say))
                write_outcomes(part.with_suffix(".jsonl"), [one for rows, _ in found for one in rows])
                numbers = {key: value for _, more in found for key, value in more.items()}
                part.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")
            outcomes += read_outcomes(part.with_suffix(".jsonl"))
            numbers = json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
            figures |= {key: value for key, value in numbers.items() if key not in figures}
    return Results(outcomes, figures)


def _material(texts: list[str], features: Features, embedding: Embedding, scene: Scene) -> Material:
    vectors_ND = features.hidden_ND
    if embedding != "hidden":
        vectors_ND = text_embedding(embedding, texts, texts_of(scene.benign("fit")))
    return Material(features.index, {embedding: vectors_ND})


def _measured(run: SeedRun, say: Say) -> Iterator[tuple[list[Outcome], dict[str, Any]]]:
    """Yield outcomes and figures of one seed and embedding."""
    config, first = run.config, run.scene.seed == run.config.seeds[0]
    main = run.embedding == config.embeddings[0]
    ours = run.ours()
    systems: list[System] = [ours]
    if config.baselines and run.embedding != "tfidf":
        systems += list(run.baselines())
    for system in systems:
        say(f"  {system.name}")
        yield _streams(run, system), {}
    if main:
        yield group_outcomes(run.scene, ours), {}
        if config.horizon:
            yield _horizon(run), {}
    if main and first:
        yield from _extras(run, ours)
    if config.own_protocol and first and run.embedding != "tfidf":
        yield [], {f"windows {run.embedding}": _windows(run, ours if main else None)}


def _streams(run: SeedRun, system: System) -> list[Outcome]:
    found: list[Outcome] = []
    for name, streams, begin in benign_scenes(run.scene):
        found += run.outcomes(system, name, streams, begin)
    for cell in run.config.cells:
        found += run.outcomes(system, cell.name, run.scene.attackers(cell))
    return found


def _horizon(run: SeedRun) -> list[Outcome]:
    """Calibrate and test again on streams that are drawn on to the horizon."""
    scene = run.scene
    run.calibration = scene.drawn_on(run.calibration)
    long = run.ours()
    return run.outcomes(long, f"drawn on to {run.config.horizon}", scene.drawn_on(scene.benign("test")))


def _extras(run: SeedRun, ours: Ours) -> Iterator[tuple[list[Outcome], dict[str, Any]]]:
    encoder, config = run.encoder, run.config
    if config.adaptive:
        found = adaptive_outcomes(run, ours, encoder.sketch_NS, encoder.probes_NP.max(1))
        left = {name: attack["left"] for name, attack in found.items()}
        yield [one for attack in found.values() for one in attack["outcomes"]], {"adaptive left": left}
    labelling = run.scene.split.families["test", "labelling"][0].texts
    width = run.material.vectors[run.embedding].shape[1]
    yield [], {"sweep": sweep_figures(ours, list(labelling), _VOCABULARY, width, run.scene.seed)}
    events = [event for stream in run.calibration[::5] for event in encoder.events(stream)[:8]]
    yield [], {"load": load_figures(ours.detector, events, config.load_principals)}


def _windows(run: SeedRun, ours: Ours | None) -> dict[str, Any]:
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
        if ours is not None and window == min(_WINDOWS):
            found[f"{window} {ours.name}"] = score_rates(partial(ours.windows, list(run.material.index)), windows)
    return found
