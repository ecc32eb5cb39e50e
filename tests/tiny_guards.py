"""Builders of guards for tiny models: random probes, thresholds at will, and an offline score."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spider_sense.calibration import BucketThresholds, Calibration, Threshold
from spider_sense.extraction.feed_counts import FeedCounts
from spider_sense.extraction.observation import Observation
from spider_sense.extraction.sketch import mean_heads
from spider_sense.extraction.standing import CLEAR, Standing
from spider_sense.extraction.watch import Watch
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import SCHEMA_VERSION, Detector, Guard, Manifest, Template
from spider_sense.models import LoadedModel
from spider_sense.scoring import Aggregator, Bank, Probe, Scorer, SiteMap
from spider_sense.scoring.bank import EPS
from spider_sense.sites import resolve
from spider_sense.types import Site

HEAD, TAIL, WIDTH = (1, 5), 2, 32


def threshold(value: float) -> Threshold:
    """Return a threshold with made-up evidence."""
    return Threshold(
        value=value, target_fpr=0.01, n=100, exceed=1, fpr_low=0.0, fpr_high=0.1, needed=299, supported=False
    )


def calibration(
    suspect: float, breach: float, longer: tuple[float, float] | None = None, bound: int = 8
) -> Calibration:
    """Return thresholds, those in ``longer`` for prompts of more than ``bound`` tokens."""
    pairs = [(bound, suspect, breach), (None, *(longer or (suspect, breach)))]
    buckets = [
        BucketThresholds(max_tokens=most, suspect=threshold(low), breach=threshold(high), pooled=False)
        for most, low, high in pairs
    ]
    return Calibration(
        suspect_fpr=0.05, breach_fpr=0.01, buckets=tuple(buckets), n=100, horizon_tokens=128, digest="0", created="2026"
    )


def probe(name: str, kind: Any, *sites: str, seed: int = 0, mlp: bool = False, **options: Any) -> Probe:
    """Return a random probe that reads one or several sites."""
    draw = torch.Generator().manual_seed(seed)
    aggregator = Aggregator(kind=kind, **options)
    hidden, columns = 5, aggregator.columns

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    maps = {
        Site.parse(site): SiteMap(normal(WIDTH, hidden), normal(hidden), normal(hidden, columns), normal(columns))
        if mlp
        else SiteMap(normal(WIDTH, columns), normal(columns))
        for site in sites
    }
    return Probe(name, "random", aggregator, maps)


def many_probes() -> tuple[Probe, ...]:
    """Return probes of several kinds, on several sites, with and without an MLP."""
    return (
        probe("attention", "attention", "resid.0", seed=1, parts=2),
        probe("ema", "ema_max", "resid.0", "resid.1", seed=2),
        probe("mlp", "mean", "mlp_in.1", seed=3, mlp=True),
        probe("window", "rolling_mean_max", "resid.1", seed=4, window=3, span="response"),
        probe("tail", "mean", "resid.1", seed=5, span="tail"),
    )


def seeker(name: str, hidden_D: Tensor, site: str = "resid.0") -> Probe:
    """Return a probe whose greatest logit is 1, reached only at hidden states of exactly this direction."""
    x_D = hidden_D / hidden_D.square().mean().sqrt()
    return Probe(
        name, "seeker", Aggregator(kind="max"), {Site.parse(site): SiteMap(x_D[:, None] / len(x_D), torch.zeros(1))}
    )


def guard(what: LoadedModel, probes: Sequence[Probe], thresholds: Calibration | None = None, **fields: Any) -> Guard:
    """Return a guard for a model; unless thresholds are given it finds everything clear."""
    detectors = [
        Detector(
            name=item.name,
            family=item.family,
            sites=tuple(map(str, item.maps)),
            aggregator=item.aggregator,
            calibration=thresholds or calibration(1e6, 2e6),
            evidence={},
        )
        for item in probes
    ]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(what),
        template=Template(head=HEAD, tail=TAIL),
        detectors=tuple(detectors),
        certified=(serving_config(what.model),),
        training={},
        probes_digest="",
    )
    return Guard(manifest, tuple(probes), **fields)


def hidden_states(model: Any, ids: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Return the hidden states [T, D] of one plain forward pass."""
    found: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> None:
        found[site] = (value[0] if isinstance(value, tuple) else value).detach().squeeze(0)

    handles = []
    for site in sites:
        place = resolve(model, site)
        if place.reads == "input":
            handles.append(place.module.register_forward_pre_hook(lambda _m, args, site=site: keep(site, args)))
        else:
            handles.append(place.module.register_forward_hook(lambda _m, _a, out, site=site: keep(site, out)))
    with torch.no_grad():
        # Neither compiled, nor through the hooks of the model itself.
        type(model).forward(model, input_ids=torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return found


def offline_peak(which: Guard, model: Any, ids: Sequence[int], prompt_length: int) -> Tensor:
    """Return each head's peak [H] over a whole conversation, without a monitor."""
    bank = Bank(which.probes)
    hidden = hidden_states(model, ids, bank.sites)
    bank.begin(len(ids))
    for site, hidden_TD in hidden.items():
        bank.tap(site)(hidden_TD)
    scorer = Scorer(bank)
    skip = len(HEAD) if tuple(ids[: len(HEAD)]) == HEAD else 1
    request = scorer.open("offline", prompt_length, skip, TAIL)
    return scorer.score_sequence(bank.logits(len(ids)), request)[0]


class Recorder:
    """Stands in the place of an extraction feed: keeps what it is offered, and says what it is told to."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self.standings: dict[str, Standing] = {}
        self.counts = FeedCounts()

    def standing(self, principal: str) -> Standing:
        return self.standings.get(principal, CLEAR)

    def offer(self, seen: Observation) -> None:
        self.seen.append(seen)
        self.counts.add("folded")


def watch() -> tuple[Watch, Recorder]:
    """Return a watch whose sketch has three numbers, and the feed that it tells."""
    recorder: Any = Recorder()
    weight = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(9)).numpy()
    heads = mean_heads(Site.parse("resid.1"), weight, np.array([0.5, 0, -1], np.float32), ("x.0", "x.1", "x.2"))
    return Watch(recorder, heads), recorder


def plain_reading(model: Any, watching: Watch, ids: Sequence[int]) -> np.ndarray:
    """Return what the watch's heads say of a prompt, by their formula."""
    site = Site.parse("resid.1")
    skip = len(HEAD) if tuple(ids[: len(HEAD)]) == HEAD else 1
    hidden_TD = hidden_states(model, ids, [site])[site][skip:]
    mean_D = (hidden_TD / (hidden_TD.square().mean(-1, keepdim=True) + EPS).sqrt()).mean(0)
    maps = [probe.maps[site] for probe in watching.probes]
    return torch.cat([mean_D @ each.weight + each.bias for each in maps]).numpy()


def pad(prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    """Return a padded batch with its mask; the pad token is 0."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def conversation(prompt: Sequence[int], new: Sequence[int], eos: int = 2) -> list[int]:
    """Return the tokens that pass through the model: the last one never does, and an end token is not scored."""
    new = list(new)
    return [*prompt, *new[: new.index(eos) if eos in new else len(new) - 1]]


def assert_streamed(which: Guard, model: Any, cases: Sequence[Any], prompts: Any, output: Any, eos: int = 2) -> None:
    """Check peaks and coverage of a call against plain forward passes over what each row says."""
    width = max(map(len, prompts))
    assert len(cases) == len(prompts) == len(output)
    for case, prompt, row in zip(cases, prompts, output, strict=True):
        ids = conversation(prompt, row[width:].tolist(), eos)
        want = offline_peak(which, model, ids, len(prompt))
        torch.testing.assert_close(torch.from_numpy(case.peak), want, rtol=1e-5, atol=1e-5)
        assert case.position == len(ids) - 1
        assert (case.coverage.scored, case.coverage.missing) == (len(ids), 0)
