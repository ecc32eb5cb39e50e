"""What a guard costs: guarded against bare generation, alternated in one run.

The guard is random, since only its size matters: 64 heads of mixed kinds spread over 8 sites, and one head at one site.
"""

import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from spider_sense.calibration import calibrate
from spider_sense.chat import Chat
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import SCHEMA_VERSION, Detector, Guard, Manifest, Template
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.training.train import default_sites
from spider_sense.types import Site

__all__ = ["bench", "random_guard"]

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
    )
    return Guard(manifest, tuple(probes))


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
        rounds: times that bare and both guards are run, in turn.
        advance: called after each round.

    Returns:
        JSON-ready: medians in tokens per second, and medians of the ratios of each round under keys in ``_ratio``.
    """
    sites = default_sites(loaded.model)
    guards = {
        "heads64_sites8": random_guard(loaded, 64, sites),
        "heads1_sites1": random_guard(loaded, 1, sites[len(sites) // 2 :][:1]),
    }
    ids_BT = torch.tensor([Chat(loaded.tokenizer).render(PROMPT).ids] * batch, device=loaded.model.device)
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *guards)}
    for round_number in range(rounds + 1):
        names = list(seconds) if round_number % 2 else list(seconds)[::-1]
        for name in names:
            taken = _run(loaded, guards.get(name), ids_BT, new_tokens)
            if round_number:  # the first round warms up
                seconds[name].append(taken)
        advance()
    tokens = batch * new_tokens
    return {
        "model": loaded.source,
        "batch": batch,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "tokens_per_s": {name: round(tokens / statistics.median(values), 1) for name, values in seconds.items()},
        **{
            f"{name}_ratio": round(statistics.median(map(_divide, seconds["bare"], seconds[name])), 4)
            for name in guards
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {loaded.model.device}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _divide(bare: float, guarded: float) -> float:
    return bare / guarded


def _run(loaded: LoadedModel, guard: Guard | None, ids_BT: torch.Tensor, new_tokens: int) -> float:
    model: Any = loaded.model
    options = {
        "attention_mask": torch.ones_like(ids_BT),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    monitor = Monitor(guard, Policy.shadow()).attach(model, loaded.tokenizer) if guard else None
    try:
        start = time.perf_counter()
        model.generate(ids_BT, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    finally:
        if monitor is not None:
            monitor.detach()
