"""One seed: fit, calibrate, and put every system before every stream."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.bench.baselines import (
    Adwin,
    Baseline,
    Coverage,
    Mahalanobis,
    Mmd,
    NearDuplicates,
    PageHinkley,
    Prada,
    RateLimit,
)
from spider_sense.extraction.bench.config import BenchConfig, Embedding
from spider_sense.extraction.bench.encode import Encoder
from spider_sense.extraction.bench.ours import Ours
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.extraction.bench.parts import KINDS
from spider_sense.extraction.bench.scene import Scene
from spider_sense.extraction.bench.systems import BaselineSystem, System, Tracer
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import PROBES
from spider_sense.extraction.population import Population
from spider_sense.extraction.probes import crossed, once_each
from spider_sense.extraction.simulator.traffic import Stream
from spider_sense.extraction.sketch import Sketch

__all__ = ["Material", "SeedRun", "benign_scenes"]


@dataclass(frozen=True, eq=False)
class Material:
    """What all seeds share: texts and what each embedding makes of them."""

    index: dict[str, int]
    vectors: dict[Embedding, NDArray[np.float32]]

    def rows(self, streams: Sequence[Stream]) -> NDArray[np.int64]:
        """Return the text of every request, in order."""
        return np.array([self.index[request.text] for stream in streams for request in stream.requests])


class SeedRun:
    """The parts of one seed with one embedding.

    Args:
        scene: streams of the seed.
        material: texts and vectors.
        embedding: which vectors.
    """

    def __init__(self, scene: Scene, material: Material, embedding: Embedding) -> None:
        self.scene, self.material, self.embedding = scene, material, embedding
        self.config: BenchConfig = scene.config
        self.fit, self.calibration = scene.benign("fit"), scene.benign("calibrate")
        self.tracer = self._tracer()

    @cached_property
    def ours(self) -> Ours:
        """This library's detector, fitted and calibrated."""
        return self.calibrated(
            self.calibration,
            [*self.scene.organisations("calibrate"), *self.scene.organisations("calibrate", one_subject=True)],
        )

    def calibrated(self, calibration: Sequence[Stream], organisations: Sequence[Sequence[Stream]] = ()) -> Ours:
        """Calibrate it, on other streams than usual if need be."""
        encoder, population = self._fitted
        return Ours(encoder, population, calibration, organisations, self.material.vectors[self.embedding].shape[1])

    @property
    def encoder(self) -> Encoder:
        """Makes what the detector reads."""
        return self._fitted[0]

    @cached_property
    def _fitted(self) -> tuple[Encoder, Population]:
        scene, material, vectors_ND = self.scene, self.material, self.material.vectors[self.embedding]
        rows = material.rows(self.fit)
        owners = [stream.principal for stream in self.fit for _ in stream.requests]
        families = {
            family.name: vectors_ND[[material.index[text] for text in family.wrapped()]]
            for family in scene.split.families["fit", "campaign"][: PROBES - 1]
        }
        sketch = Sketch.fit(vectors_ND[rows], owners, families)
        sketch_NS, probes_NP = sketch.project(vectors_ND)
        key = Key(hashlib.sha256(f"bench {scene.seed}".encode()).digest())
        # What is usual is read off probes that were fitted on other work.
        unseen_NP = probes_NP.copy()
        unseen_NP[rows, 0] = crossed(vectors_ND[rows], once_each(owners), self._work(), families)
        fitting = Encoder(key, material.index, sketch_NS, unseen_NP)
        population = Population.fit(fitting.all(self.fit), key, sketch.names)
        return Encoder(key, material.index, sketch_NS, probes_NP), population

    def _work(self) -> list[str]:
        """Return the family of every request of the fit part; a person is one alone."""
        families = self.scene.split.families
        of = {text: f"{kind} {one.name}" for kind in KINDS for one in families["fit", kind] for text in one.texts}
        return [of.get(request.text, stream.principal) for stream in self.fit for request in stream.requests]

    def baselines(self) -> Iterator[System]:
        """Calibrate every baseline."""
        background = self.tracer.background(self.fit)
        methods: tuple[Baseline, ...] = (
            RateLimit(),
            Prada(),
            NearDuplicates(),
            Mahalanobis(background),
            Coverage(background),
            Mmd(background),
            Adwin(background),
            PageHinkley(background),
        )
        for method in methods:
            yield BaselineSystem(method, self.tracer, self.calibration, self.config.alpha)

    def outcomes(self, system: System, name: str, streams: Sequence[Stream], begin: int = 0) -> list[Outcome]:
        """Return what a system makes of streams.

        Args:
            system: the system.
            name: of the streams.
            streams: who is tested.
            begin: innocent requests before what is to be found, for streams without an attack.
        """
        templates = {family.name: family.has_template for family in self.scene.families}
        found = []
        for stream, alarm in zip(streams, system.alarms(streams), strict=True):
            first = stream.first_attack
            found.append(
                Outcome(
                    seed=self.scene.seed,
                    system=system.name,
                    embedding=self.embedding,
                    scene=name,
                    stratum=stream.tenant,
                    family=stream.campaign or stream.family,
                    length=len(stream),
                    alarm=alarm.count if alarm else None,
                    begin=begin if first is None else first,
                    tier=alarm.tier if alarm else "",
                    limit=alarm.limit if alarm else None,
                    template=templates.get(stream.campaign, False),
                )
            )
        return found

    def _tracer(self) -> Tracer:
        vectors_ND = self.material.vectors[self.embedding].astype(np.float64)
        if self.embedding == "hidden":
            # The mean of hidden states is large and the same everywhere; what differs is left.
            vectors_ND -= vectors_ND[self.material.rows(self.fit)].mean(0)
        length_N1 = np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
        return Tracer(self.material.index, vectors_ND / length_N1)


def benign_scenes(scene: Scene) -> Iterator[tuple[str, list[Stream], int]]:
    """Yield the innocent streams that are tested: name, streams, innocent requests before what could be found."""
    config = scene.config
    test = scene.benign("test")
    yield "unseen families", test, 0
    yield "seen families", scene.benign("test", "calibrate", "again-"), 0
    pivots = [cell for cell in config.cells if cell.start == "pivot"]
    if pivots:
        yield "no attack", scene.without_attack(pivots[0]), config.warm_up
    yield "other work", scene.other_work(), config.warm_up
