"""Train a guard: capture, sweep, fit, calibrate, measure, write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.baselines import save_baselines
from spider_sense.calibration import Calibration, calibrate, check_rates
from spider_sense.capture import Capture
from spider_sense.chat import Chat
from spider_sense.data import digest
from spider_sense.evaluation import evaluate
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.folders import check_writable
from spider_sense.guard import (
    BASELINES,
    KIND,
    SCHEMA_VERSION,
    Control,
    Detector,
    Guard,
    Manifest,
    Template,
)
from spider_sense.models import LoadedModel, load_model
from spider_sense.offline import score_activations
from spider_sense.scoring import Probe
from spider_sense.sites import layer_count
from spider_sense.training.canaries import make_canaries
from spider_sense.training.collect import collect
from spider_sense.training.config import DetectorConfig, TrainConfig
from spider_sense.training.controls import Controls
from spider_sense.training.families import fit
from spider_sense.training.parts import Parts, choose_parts
from spider_sense.training.sweep import Sweep, Task, sweep
from spider_sense.types import Site

__all__ = ["Trained", "calibrate_probe", "default_sites", "train"]

DEPTHS = 8
STEERED_BY = 64
"""Prompts of a class that a steering vector is the mean of."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training run leaves behind."""

    guard: Guard
    folder: Path
    sweeps: dict[str, Sweep]
    """By detector."""
    results: dict[str, dict[str, Any]]
    """Test results by detector, as :func:`spider_sense.evaluation.evaluate` gives them."""


def train(config: TrainConfig, progress: Progress | None = None, loaded: LoadedModel | None = None) -> Trained:
    """Run a training from captured activations to a guard on disk.

    Args:
        config: what to do.
        progress: gets bars for capturing and sweeping.
        loaded: the model, if it is loaded already.

    Raises:
        SpiderSenseError: for anything wrong with the configuration, the data or the model; no guard is written then.
    """
    check_rates(config.suspect_fpr, config.breach_fpr)
    KIND.check_replaceable(config.output)
    check_writable(config.work)
    parts = choose_parts(config)
    loaded = loaded or load_model(config.model, config.dtype, config.device)
    sites = tuple(map(Site.parse, config.sites)) or default_sites(loaded.model)
    data = collect(
        loaded,
        parts.examples,
        sites,
        config.work,
        respond=parts.respond(config),
        max_tokens=config.max_tokens,
        progress=progress,
    )
    made = [_detector(config, detector, parts, data, progress) for detector in config.detectors]
    chat = Chat(loaded.tokenizer)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(loaded),
        template=Template(head=chat.head, tail=chat.tail),
        detectors=tuple(item.record for item in made),
        controls=tuple(_control(probe, item.record.name) for item in made for probe in item.controls.probes),
        certified=(serving_config(loaded.model),),
        training=_provenance(config, parts) | {"sweep": {item.record.name: _swept(item.sweep) for item in made}},
        probes_digest="",
        canaries=make_canaries(loaded, [item.probe for item in made]),
    )
    guard = Guard(
        manifest,
        tuple(item.probe for item in made),
        tuple(probe for item in made for probe in item.controls.probes),
        _steering_vectors(loaded, parts, made[0].sites_by_depth),
    )
    results = {item.record.name: _measure(guard, index, item, loaded, parts) for index, item in enumerate(made)}
    guard = _with_evidence(guard, results)
    _write(guard, made, config.output)
    sweeps = {item.record.name: item.sweep for item in made}
    return Trained(Guard.from_pretrained(config.output), config.output, sweeps, results)


def default_sites(model: Any) -> tuple[Site, ...]:
    """Return resid at eight depths from a fifth of the model to just below its end."""
    layers = layer_count(model)
    depths = np.unique(np.linspace(layers / 5, layers - 2, min(DEPTHS, layers)).round().astype(int))
    return tuple(Site(layer=int(layer), place="resid") for layer in depths.clip(0, layers - 1))


def calibrate_probe(
    probe: Probe, data: ActivationSet, benign: np.ndarray, suspect_fpr: float, breach_fpr: float
) -> Calibration:
    """Set a probe's thresholds on benign conversations.

    Args:
        probe: what to calibrate.
        data: the captured conversations.
        benign: indices of benign ones that nothing was fitted on.
        suspect_fpr: share of them that may be suspect or worse.
        breach_fpr: share of them that may be a breach.
    """
    scored = score_activations([probe], data, benign)
    ids = [data.ids[index] for index in benign]
    response = int((np.diff(data.starts) - data.prompt_rows)[benign].max())
    return calibrate(scored.peak_NH[:, 0], scored.tokens, ids, suspect_fpr, breach_fpr, response)


def _with_response(data: ActivationSet, which: np.ndarray) -> np.ndarray:
    """Keep the conversations that have a response; if none has, all of them."""
    answered = which[np.diff(data.starts)[which] > data.prompt_rows[which]]
    return answered if len(answered) else which


@dataclass(frozen=True, slots=True)
class _Made:
    """One detector, trained."""

    config: DetectorConfig
    probe: Probe
    record: Detector
    controls: Controls
    sweep: Sweep

    @property
    def sites_by_depth(self) -> tuple[Site, ...]:
        return tuple(sorted(self.probe.maps))


def _detector(
    config: TrainConfig, detector: DetectorConfig, parts: Parts, data: ActivationSet, progress: Progress | None
) -> _Made:
    used, positive = parts.labels(detector)
    members = {name: np.flatnonzero(used & (parts.part == name)) for name in ("train", "validation", "calibration")}
    task = Task(data, positive, members["train"], members["validation"], detector.name)
    bar = progress.add_task(f"Sweeping {detector.name}", total=None) if progress else None

    def advance(candidate: object) -> None:
        if progress is not None and bar is not None:
            progress.advance(bar)

    found = sweep(task, data.sites, config.families, config.fit, advance)
    if progress is not None and bar is not None:
        progress.update(bar, total=len(found.candidates), completed=len(found.candidates))
    # What was chosen is fitted once more on all that it was chosen with.
    both = np.concatenate((task.train, task.validation))
    best = found.best
    probe = fit(best.probe.family, data, both, positive, best.sites, detector.name, config.fit)
    controls = Controls.fit(parts.examples, Task(data, positive, both, both, detector.name), probe, config.fit)
    ordinary = np.array([example.source not in config.hard for example in parts.examples])
    benign = _with_response(data, np.flatnonzero(used & (parts.part == "calibration") & ~positive & ordinary))
    record = Detector(
        name=detector.name,
        family=probe.family,
        sites=tuple(map(str, probe.maps)),
        aggregator=probe.aggregator,
        calibration=calibrate_probe(probe, data, benign, config.suspect_fpr, config.breach_fpr),
        evidence={},
    )
    return _Made(detector, probe, record, controls, found)


def _control(probe: Probe, detector: str) -> Control:
    return Control(
        name=probe.name,
        detector=detector,
        family=probe.name.partition(".")[2],
        sites=tuple(map(str, probe.maps)),
        aggregator=probe.aggregator,
    )


def _provenance(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    names, counts = np.unique(parts.part, return_counts=True)
    return {
        "config": config.model_dump(mode="json", exclude={"output", "work"}),
        "data_digest": digest(parts.examples),
        "sources": sorted({example.source for example in parts.examples}),
        "test_sources": sorted(parts.test),
        "parts": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "dropped_repeats": parts.dropped,
    }


def _swept(found: Sweep) -> list[dict[str, Any]]:
    return [
        {
            "family": candidate.probe.family,
            "sites": [str(site) for site in candidate.sites],
            "auroc": round(candidate.auroc, 4),
            "log_auroc": round(candidate.log_auroc, 4),
            "tpr_at_1pct_fpr": round(candidate.tpr, 4),
        }
        for candidate in found.candidates
    ]


@torch.inference_mode()
def _steering_vectors(loaded: LoadedModel, parts: Parts, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Return the vector ``refusal``: from benign to harmful prompts at their last token, in the raw residual stream."""
    resid = [site for site in sites if site.place == "resid"]
    harmful = [
        row for row, part in zip(parts.examples, parts.part, strict=True) if part == "train" and row.label == "harmful"
    ]
    benign = [
        row for row, part in zip(parts.examples, parts.part, strict=True) if part == "train" and row.label == "benign"
    ]
    if not resid or not harmful or not benign:
        return {}
    site, chat, means = resid[len(resid) // 2], Chat(loaded.tokenizer), []
    model: Any = loaded.model
    with Capture(model, [site]) as capture:
        for rows in (harmful[:STEERED_BY], benign[:STEERED_BY]):
            lasts = []
            for row in rows:
                ids = chat.render(row.turns or row.text, 256).ids
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
                lasts.append(capture.take()[0].hidden[site][-1].float().cpu())
            means.append(torch.stack(lasts).mean(0))
    return {f"refusal@{site}": means[0] - means[1]}


def _measure(guard: Guard, index: int, item: _Made, loaded: LoadedModel, parts: Parts) -> dict[str, Any]:
    baselines = item.controls.length, item.controls.tfidf
    return evaluate(guard, index, baselines, loaded, parts.test, item.config.label_map)


def _with_evidence(guard: Guard, results: dict[str, dict[str, Any]]) -> Guard:
    records = tuple(
        record.model_copy(update={"evidence": _short(results[record.name])}) for record in guard.manifest.detectors
    )
    manifest = guard.manifest.model_copy(update={"detectors": records})
    return Guard(manifest, guard.probes, guard.controls, guard.vectors)


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest keeps of a result, and in words what it does not show."""
    overall = dict(result["overall"])
    if not overall["beats_tfidf"]:
        overall["warning"] = "this probe does not beat TF-IDF by more than the interval: words alone may explain it"
    files = {name: part["guard"] for name, part in result["files"].items()}
    return {"overall": overall, "groups": result["groups"], "files": files}


def _write(guard: Guard, made: list[_Made], folder: Path) -> None:
    with KIND.staged(folder) as beside:
        guard.write_into(beside)
        for item in made:
            target = beside / BASELINES / item.record.name
            target.mkdir(parents=True)
            save_baselines(target, item.controls.length, item.controls.tfidf)
