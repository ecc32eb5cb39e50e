"""What a guard and a live patch cost: against bare generation, alternated in one run.

Guard and patch are random, since only their size matters: 64 heads of mixed kinds spread over 8 sites, or one head at
one site; two vectors and eight neurons a projection. A quarter of the requests have a shorter prompt; the guard of the
run that patches them has a suspect threshold for prompts of that length that every score reaches.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spider_sense.calibration import Calibration, calibrate
from spider_sense.chat import Chat
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import SCHEMA_VERSION, Detector, Guard, Manifest, Template
from spider_sense.intervals import ratio_of_rounds
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.patch import KIND, NeuronPatch, PatchManifest, PatchTarget
from spider_sense.policy import Patch, Policy, Rule
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.sites import available_places, layer_count, resolve
from spider_sense.training.canaries import make_canaries
from spider_sense.training.train import default_sites
from spider_sense.types import Site

__all__ = ["bench", "random_guard", "random_patch"]

KINDS = (
    Aggregator(kind="mean"),
    Aggregator(kind="max"),
    Aggregator(kind="ema_max"),
    Aggregator(kind="softmax"),
    Aggregator(kind="attention"),
    Aggregator(kind="cusum"),
    Aggregator(kind="rolling_mean_max", window=16),
    Aggregator(kind="rolling_attention", window=10),
)
PROMPT = "Describe a quiet morning by the sea for somebody who has never been there, and end with a question."
SHORT_PROMPT = "Describe a quiet morning by the sea, and end with a question."


def random_guard(loaded: LoadedModel, heads: int, sites: tuple[Site, ...]) -> Guard:
    """Return a guard with random probes of all kinds in turn, spread evenly over the sites."""
    generator = torch.Generator().manual_seed(0)
    width = loaded.model.config.get_text_config().hidden_size
    probes = []
    for index in range(heads):
        aggregator, site = KINDS[index // len(sites) % len(KINDS)], sites[index % len(sites)]
        weight = torch.randn(width, aggregator.columns, generator=generator) / width
        probes.append(
            Probe(f"head{index}", "random", aggregator, {site: SiteMap(weight, torch.zeros(weight.shape[1]))})
        )
    calibration = calibrate(np.linspace(9.0, 10.0, 100), np.full(100, 32), [str(n) for n in range(100)])
    chat = Chat(loaded.tokenizer)
    detectors = tuple(
        Detector(
            name=probe.name,
            family=probe.family,
            sites=tuple(map(str, probe.maps)),
            aggregator=probe.aggregator,
            calibration=calibration,
            evidence={},
        )
        for probe in probes
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(loaded),
        template=Template(head=chat.head, tail=chat.tail),
        detectors=detectors,
        certified=(serving_config(loaded.model),),
        training={},
        probes_digest="",
        canaries=make_canaries(loaded, probes),
    )
    return Guard(manifest, tuple(probes))


def random_patch(loaded: LoadedModel, clusters: int = 2, rows: int = 8, scale: float = 0.02) -> NeuronPatch:
    """Return a patch of random vectors on random neurons of every gate and up projection.

    Args:
        loaded: the model.
        clusters: vectors a projection.
        rows: neurons a projection.
        scale: standard deviation of the vectors' numbers.
    """
    generator = torch.Generator().manual_seed(0)
    width = loaded.model.config.get_text_config().hidden_size
    places = [place for place in available_places(loaded.model) if place in ("gate", "up")]
    sites = [Site(layer, place) for layer in range(layer_count(loaded.model)) for place in places]
    targets = {
        site: PatchTarget(
            neuron_R=torch.randperm(resolve(loaded.model, site).width, generator=generator)[:rows].sort().values,
            cluster_R=torch.arange(rows) % clusters,
            vectors_KD=scale * torch.randn(clusters, width, generator=generator),
        )
        for site in sites
    }
    trained = len(sites) * clusters * width
    manifest = PatchManifest(
        schema_version=KIND.version,
        base=fingerprint(loaded),
        sites=tuple(map(str, sites)),
        trained_parameters=trained,
        trained_share=trained / loaded.model.num_parameters(),
        recipe={"random": True},
    )
    return NeuronPatch(manifest, targets)


def bench(
    loaded: LoadedModel,
    batch: int = 8,
    new_tokens: int = 32,
    rounds: int = 9,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure throughput.

    Args:
        loaded: the model.
        batch: requests generated together.
        new_tokens: tokens of each.
        rounds: times that each way is run, in turn: bare, with each guard, and with a patch beside the first guard that
            is on for nobody or for a quarter of the requests, and bare once more, which shows the machine's noise.
        advance: called after each round.

    Returns:
        JSON-ready: medians in tokens per second, and medians of the ratios of each round under keys in ``_ratio``: to
        bare generation, and for the patch also to the guard without it, in ``_to_guard_ratio``; beside each its 95%
        bootstrap interval over rounds, in ``_interval``.
    """
    inputs, patched = _inputs(loaded, batch)
    ways = _ways(loaded, int(inputs["attention_mask"][0].sum()), f"patch_{patched}_of_{batch}", batch)
    seconds = _alternate(loaded, ways, inputs, new_tokens, rounds, advance)
    tokens = batch * new_tokens
    ratios: dict[str, Any] = {}
    for name in ways:
        if name != "bare":
            ratios |= _ratio(name, seconds["bare"], seconds[name])
        if name.startswith("patch"):
            ratios |= _ratio(f"{name}_to_guard", seconds["heads64_sites8"], seconds[name])
    return {
        "model": loaded.source,
        "batch": batch,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "tokens_per_s": {name: round(tokens / statistics.median(values), 1) for name, values in seconds.items()},
        **ratios,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _inputs(loaded: LoadedModel, batch: int) -> tuple[dict[str, Tensor], int]:
    """Return a left-padded batch, and how many of its first rows have the shorter prompt."""
    patched = max(1, batch // 4)
    chat = Chat(loaded.tokenizer)
    prompts = [chat.render(SHORT_PROMPT if row < patched else PROMPT).ids for row in range(batch)]
    width = max(map(len, prompts))
    ids_BT, mask_BT = torch.zeros(2, batch, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :], mask_BT[row, width - len(prompt) :] = torch.tensor(prompt), 1
    device = loaded.model.device
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}, patched


def _ways(loaded: LoadedModel, short: int, patched: str, batch: int) -> dict[str, Callable[[], Monitor] | None]:
    """Return what to attach for each way to generate; the monitors of the patch patch prompts of ``short`` tokens."""
    sites = default_sites(loaded.model)
    many, one = random_guard(loaded, 64, sites), random_guard(loaded, 1, sites[len(sites) // 2 :][:1])
    flagging, patch = _flagging(many, short), random_patch(loaded)
    rules = (Rule(detector="*", zone="suspect", action="patch"), Rule(detector="*", zone="breach", action="observe"))
    policy = Policy(rules=rules, on_missing="observe", patch=Patch())
    return {
        "bare": None,
        "heads64_sites8": lambda: Monitor(many, Policy.shadow()),
        "heads1_sites1": lambda: Monitor(one, Policy.shadow()),
        f"patch_0_of_{batch}": lambda: Monitor(many, policy, patch=patch),
        patched: lambda: Monitor(flagging, policy, patch=patch),
        "bare_again": None,
    }


def _flagging(guard: Guard, tokens: int) -> Guard:
    """Return the guard with its first detector finding every prompt of at most so many tokens suspect."""
    first, *others = guard.manifest.detectors
    changed = first.model_copy(update={"calibration": _lowered(first.calibration, tokens)})
    return Guard(guard.manifest.model_copy(update={"detectors": (changed, *others)}), guard.probes)


def _lowered(calibration: Calibration, tokens: int) -> Calibration:
    bucket = calibration.thresholds(tokens)
    suspect = bucket.suspect.model_copy(update={"value": -1e9})
    short = bucket.model_copy(update={"max_tokens": tokens, "suspect": suspect})
    longer = [item for item in calibration.buckets if item.max_tokens is None or item.max_tokens > tokens]
    return calibration.model_copy(update={"buckets": (short, *longer)})


def _alternate(
    loaded: LoadedModel,
    ways: Mapping[str, Callable[[], Monitor] | None],
    inputs: dict[str, Tensor],
    new_tokens: int,
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; every other round goes through them backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        names = list(seconds) if round_number % 2 else list(seconds)[::-1]
        for name in names:
            taken = _run(loaded, ways[name], inputs, new_tokens)
            if round_number:  # the first round warms up
                seconds[name].append(taken)
        advance()
    return seconds


def _ratio(name: str, plain: list[float], with_more: list[float]) -> dict[str, Any]:
    ratio, interval = ratio_of_rounds(plain, with_more)
    return {f"{name}_ratio": round(ratio, 4), f"{name}_interval": [round(interval.low, 4), round(interval.high, 4)]}


def _run(loaded: LoadedModel, way: Callable[[], Monitor] | None, inputs: dict[str, Tensor], new_tokens: int) -> float:
    model: Any = loaded.model
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    monitor = way().attach(model, loaded.tokenizer) if way else None
    try:
        start = time.perf_counter()
        model.generate(**inputs, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    finally:
        if monitor is not None:
            monitor.detach()
