"""Builders of guards for tiny models: random probes, thresholds at will, an offline score, and an engine to guard."""

from collections.abc import Sequence
from types import SimpleNamespace
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
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel
from spider_sense.policy import Extraction, Policy
from spider_sense.scoring import Aggregator, Bank, Probe, Scorer, SiteMap
from spider_sense.scoring.bank import EPS
from spider_sense.serving.engine_guard import EngineGuard
from spider_sense.serving.findings import Findings
from spider_sense.serving.origin import name_principal
from spider_sense.sites import resolve
from spider_sense.types import Site

HEAD, TAIL, WIDTH = (1, 5), 2, 32
SIZE, BLOCKS = 4, 64
WATCHING = Policy(
    rules=(), on_missing="observe", extraction=Extraction(watch="observe", limit="omit_reasoning", act="stop")
)


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


class Engine:
    """As much of an engine as the guard sees: requests, blocks with a prefix cache, steps of any shape."""

    def __init__(
        self,
        what: LoadedModel,
        guard: Any,
        helpers: Any,
        cached: bool = True,
        second_runner: bool = False,
        watch: Any = None,
    ) -> None:
        self.second_runner = second_runner
        self.looks_ahead = False
        """Whether a step's tokens are taken in only when the next one has been folded."""
        self.pending: tuple[Any, dict[str, list[int]]] | None = None
        self.what, self.helpers, self.which = what, helpers, guard
        policy = Policy.shadow() if watch is None else WATCHING
        self.guard = EngineGuard(Judge(guard, policy, watch=watch), longest=1000)
        if cached:
            self.guard.kv_states.keep(SIZE, BLOCKS)
        self.sites = self.guard.judge.bank.sites
        self.cache: dict[tuple[int, ...], int] = {}
        self.free = list(range(BLOCKS))
        self.requests: dict[str, SimpleNamespace] = {}
        self.finished: set[str] = set()
        self.found: dict[str, tuple[Findings, int]] = {}
        self.patched: dict[str, int] = {}

    def add(self, name: str, prompt: Sequence[int], answer: Sequence[int], principal: str | None = None) -> None:
        """Let a request wait: its prompt, what it will generate, and who sends it."""
        ids = [*prompt, *answer]
        hidden = self.helpers.hidden_states(self.what.model, ids, self.sites)
        self.requests[name] = SimpleNamespace(
            ids=ids, prompt=len(prompt), known=len(prompt), done=0, furthest=0, blocks=[], state="new", hidden=hidden
        )
        self.requests[name].params = SimpleNamespace(
            extra_args=None,
            max_tokens=1000 - len(prompt),
            logit_bias={7: 1.0, 5: -1.0},
            logprobs=4,
            logprob_token_ids=None,
            allowed_token_ids=None,
            prompt_logprobs=None,
            prompt_logprob_token_ids=None,
            temperature=0.5,
        )
        name_principal(self.requests[name].params, principal)

    def preempt(self, name: str) -> None:
        request = self.requests[name]
        request.state, request.done, request.blocks = "resumed", 0, []

    def step(self, plan: dict[str, int], drafts: dict[str, int] | None = None) -> None:
        """Compute some tokens of some requests.

        Args:
            plan: most tokens of each; a draft is on top of them.
            drafts: of requests that decode, how many wrong tokens are drafted after the certain one.
        """
        new, again, counts = (
            [],
            SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set(), num_computed_tokens=[]),
            {},
        )
        for name, most in plan.items():
            request = self.requests[name]
            extra = (drafts or {}).get(name, 0) if request.done == request.known - 1 >= request.prompt else 0
            if request.state != "running":
                request.done = self._hit(request)
            count = min(most, request.known - request.done) + extra
            blocks = self._blocks(request, request.done + count)
            if request.state == "new" or (self.second_runner and request.state == "resumed"):
                new.append(
                    SimpleNamespace(
                        req_id=name,
                        prompt_token_ids=request.ids[: request.prompt],
                        block_ids=(request.blocks,),
                        num_computed_tokens=request.done,
                        lora_request=None,
                        sampling_params=request.params,
                    )
                )
            else:
                again.req_ids.append(name)
                resumed = request.state == "resumed"
                again.new_block_ids.append((list(request.blocks),) if resumed else (blocks,) if blocks else None)
                again.num_computed_tokens.append(request.done)
                again.resumed_req_ids |= {name} if resumed else set()
            request.state, counts[name] = "running", (count, extra)
            # As vLLM does, blocks are lent before they are filled, within one step too.
            for place in range((request.done + count - extra) // SIZE):
                self.cache.setdefault(tuple(request.ids[: (place + 1) * SIZE]), request.blocks[place])
        total = sum(count for count, _ in counts.values())
        self.guard.begin(
            SimpleNamespace(
                spider_sense_patched={name: self.patched[name] for name in plan if name in self.patched},
                finished_req_ids=self.finished,
                scheduled_new_reqs=new,
                scheduled_cached_reqs=again,
                total_num_scheduled_tokens=total,
                scheduled_spec_decode_tokens={name: [0] * extra for name, (_, extra) in counts.items() if extra},
            )
        )
        self.finished = set()
        if counts:
            self._run(counts, total)

    def _run(self, counts: dict[str, tuple[int, int]], total: int) -> None:
        order = sorted(counts)[::-1]  # not the scheduler's
        bank = self.guard.judge.bank
        for site in self.sites:
            rows = []
            for name in order:
                request, (count, extra) = self.requests[name], counts[name]
                real = request.hidden[site][request.done : request.done + count - extra]
                rows += [real, torch.randn(extra, real.shape[1]) * 50]
            bank.tap(site)(torch.cat(rows))
        starts = np.cumsum([0, *(counts[name][0] for name in order)])
        # A graph is replayed with as many requests as it was captured with.
        padding = [0, 0] if self.second_runner else []
        positions = [self.requests[name].done for name in order]
        self.guard.rows(order, [*starts.tolist(), *(total for _ in padding)], positions + padding)
        accepted = {}
        for name in order:
            request, (count, extra) = self.requests[name], counts[name]
            request.done += count - extra
            request.furthest = max(request.furthest, request.done)
            ended = request.done == request.known
            accepted[name] = request.ids[request.known : request.known + 1] if ended else []
            request.known += len(accepted[name])
        before, self.pending = self.pending, (self.guard.fold(), accepted)
        if self.looks_ahead:
            if before is not None:
                self._settle(*before)
        else:
            self.settle()

    def settle(self) -> None:
        """Take in the tokens of the last step."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._settle(*pending)

    def _settle(self, step: Any, accepted: dict[str, list[int]]) -> None:
        findings = self.guard.settle(step, accepted)
        self.found |= {name: (findings, row) for row, name in enumerate(findings.ids)}

    def _hit(self, request: SimpleNamespace) -> int:
        """Let a request begin with blocks that hold its own first tokens."""
        request.blocks = []
        for end in range(SIZE, request.known, SIZE):
            block = self.cache.get(tuple(request.ids[:end]))
            if block is None:
                break
            request.blocks.append(block)
        return len(request.blocks) * SIZE

    def _blocks(self, request: SimpleNamespace, tokens: int) -> list[int]:
        more = [self.free.pop() for _ in range(-(-tokens // SIZE) - len(request.blocks))]
        request.blocks += more
        return more

    def check(self, name: str, helpers: Any) -> None:
        """Compare what was found last with a plain pass over the tokens that were computed."""
        findings, row = self.found[name]
        request = self.requests[name]
        ids = request.ids[: request.furthest]
        want_H = helpers.offline_peak(self.which, self.what.model, ids, request.prompt)
        torch.testing.assert_close(torch.from_numpy(findings.peak_BH[row]), want_H, rtol=1e-5, atol=1e-5)
        scored, cached, missing = findings.coverage_B3[row].tolist()
        assert (scored + cached, missing) == (request.furthest, 0)


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
