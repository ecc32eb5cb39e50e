"""Thousands of requests at a guarded vLLM server: random lengths, shared prefixes, clients that hang up.

    python bench/soak.py --requests 2000

Scores and zones of every answer are compared with those that plain passes of transformers give the same tokens; the
audit log has to open and close every request once, also those whose clients left. Some of the thresholds lie where
such requests score, so that all zones occur and requests are stopped. Run it in the environment of vLLM. The last line
is JSON; `lost`, `wrong`, `misattributed`, `uncovered` and `unrecorded` must be 0.
"""

import asyncio
import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import typer
from _server import CONSOLE, ask, server
from rich.progress import Progress

from spider_sense.bench import random_guard
from spider_sense.calibration import calibrate, zone
from spider_sense.chat import Chat, Rendered, unscored
from spider_sense.corpus import load_corpus
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel, load_model
from spider_sense.offline import ScoredSet, score_rendered
from spider_sense.types import ZONES, Site

TOLERANCE = 1e-4
"""Of a score, or of 1 if the score is smaller."""
MUST_BE_ZERO = ("lost", "wrong", "misattributed", "uncovered", "unrecorded")
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(slots=True)
class Answer:
    """What a client was sent."""

    id: str = ""
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    said: dict[str, Any] | None = None
    left: bool = False
    """Whether the client hung up."""

    @property
    def covered(self) -> int:
        """Tokens that the verdict rests on."""
        assert self.said is not None
        return int(self.said["coverage"]["scored"] + self.said["coverage"]["cached"])

    @property
    def scores(self) -> list[float]:
        """Of every head."""
        assert self.said is not None
        return [float(found["score"]) for found in self.said["detectors"].values()]


def main(
    model: Annotated[str, typer.Option(help="Local folder of a model; smollm2 is the packaged one.")] = "smollm2",
    requests: Annotated[int, typer.Option(help="How many.")] = 2000,
    concurrent: Annotated[int, typer.Option(help="How many at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of lengths, prefixes and hang-ups.")] = 0,
    eager: Annotated[bool, typer.Option(help="Serve without torch.compile.")] = False,
) -> None:
    """Load a guarded server and compare every answer with its offline score."""
    loaded, rng = load_model(model, "float32"), Random(seed)  # noqa: S311 - load, not secrets
    guard = _guard(loaded, rng)
    with tempfile.TemporaryDirectory() as folder:
        guard.save_pretrained(Path(folder) / "guard")
        audit = Path(folder) / "audit.jsonl"
        options = ["--scores", "--audit", str(audit), "--dtype", "float32", "--max-model-len", "1024"]
        options += ["--max-num-seqs", str(concurrent), "--max-num-batched-tokens", "256", "--block-size", "32"]
        options += ["--enforce-eager"] if eager else []
        with server(loaded.model.name_or_path, options, Path(folder, "server"), Path(folder, "guard")) as running:
            answers = asyncio.run(_all(running.address, requests, concurrent, rng))
        events = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
    report = {"requests": requests, **_compared(answers, guard, loaded), "unrecorded": _unrecorded(answers, events)}
    typer.echo(json.dumps(report))
    if any(report[name] for name in MUST_BE_ZERO):
        raise typer.Exit(1)


def _guard(loaded: LoadedModel, rng: Random) -> Guard:
    """Return a guard of 64 heads at 8 sites, four of which find something in such requests."""
    layers = loaded.model.config.num_hidden_layers
    guard = random_guard(loaded, 64, tuple(Site(place * layers // 8, "resid") for place in range(8)))
    openings, chat = _openings(rng), Chat(loaded.tokenizer)
    prompts = [chat.render(_prompt(openings, rng)) for _ in range(64)]
    scores = _score(loaded, guard, prompts, [len(prompt.ids) for prompt in prompts], "calibrating")
    detectors = [
        detector
        if head % 16
        else detector.model_copy(
            update={
                "calibration": calibrate(
                    scores.peak_NH[:, head], scores.tokens, list(map(str, range(64))), suspect_fpr=0.1, breach_fpr=0.02
                )
            }
        )
        for head, detector in enumerate(guard.manifest.detectors)
    ]
    return Guard(guard.manifest.model_copy(update={"detectors": tuple(detectors)}), guard.probes)


def _score(
    loaded: LoadedModel, guard: Guard, rendered: list[Rendered], prompt_lengths: list[int], what: str
) -> ScoredSet:
    with Progress(console=CONSOLE) as progress:
        task = progress.add_task(what, total=len(rendered))
        return score_rendered(
            loaded, guard.probes, rendered, prompt_lengths, advance=lambda count: progress.advance(task, count)
        )


def _openings(rng: Random) -> list[str]:
    return [" ".join(rng.sample(_TEXTS, rng.choice((1, 2, 3, 8)))) for _ in range(12)]


_TEXTS = [row.text for row in load_corpus() if row.source == "corpus_everyday"]


def _prompt(openings: list[str], rng: Random) -> str:
    shared = [rng.choice(openings)] if rng.random() < 0.7 else []
    return " ".join((*shared, *rng.sample(_TEXTS, rng.choice((1, 1, 2, 4)))))


async def _all(address: str, requests: int, concurrent: int, rng: Random) -> list[Answer]:
    from openai import AsyncOpenAI

    openings, gate, done = _openings(rng), asyncio.Semaphore(concurrent), 0

    async def one(client: Any, place: int) -> Answer:
        nonlocal done
        prompt, new_tokens = _prompt(openings, rng) if rng.random() > 0.02 else f"{place}", rng.randint(1, 16)
        leave_after = rng.randint(1, 6) if rng.random() < 0.15 else None
        async with gate:
            answer = await _stream(client, prompt, new_tokens, leave_after)
        done += 1
        if done % 100 == 0:
            CONSOLE.print(f"{done} of {requests} requests")
        return answer

    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        answers = await asyncio.gather(*(one(client, place) for place in range(requests)))
        # A request is closed with the step after its end, and this one needs several.
        await _stream(client, "Good night.", 8, None)
        return list(answers)


async def _stream(client: Any, prompt: str, new_tokens: int, leave_after: int | None) -> Answer:
    stream, answer, chunks = await ask(client, prompt, new_tokens, return_token_ids=True), Answer(), 0
    async for chunk in stream:
        extra, chunks, answer.id = chunk.model_extra or {}, chunks + 1, chunk.id
        answer.prompt = extra.get("prompt_token_ids") or answer.prompt
        for choice in chunk.choices:
            answer.tokens += (choice.model_extra or {}).get("token_ids") or []
        answer.said = (extra.get("kv_transfer_params") or {}).get("spider_sense", answer.said)
        if chunks == leave_after and answer.said is None:
            answer.left = True
            await stream.close()
            break
    return answer


def _compared(answers: list[Answer], guard: Guard, loaded: LoadedModel) -> dict[str, Any]:
    """Compare verdicts with offline scores of the same tokens."""
    judged = [one for one in answers if one.said is not None]
    template = guard.manifest.template
    rendered = [
        Rendered(tuple((one.prompt + one.tokens)[: one.covered]), unscored(template.head, one.prompt), template.tail)
        for one in judged
    ]
    want_NH = _score(loaded, guard, rendered, [len(one.prompt) for one in judged], "comparing").peak_NH
    found_NH = np.array([one.scores for one in judged])
    error_N = _error(found_NH, want_NH)
    other_N = [not _same_zones(one, want_H, guard) for one, want_H in zip(judged, want_NH, strict=True)]
    # Whether it fits somebody else's score tells a verdict that was mixed up from one that was miscounted.
    strange = np.flatnonzero(error_N > TOLERANCE)
    mixed_up = [bool((_error(found_NH[place], want_NH) <= TOLERANCE).any()) for place in strange]
    said = [one.said for one in judged if one.said is not None]
    zones, covered = Counter(one["zone"] for one in said), [one["coverage"] for one in said]
    return {
        "compared": len(judged),
        "left": sum(one.left for one in answers),
        "lost": sum(one.said is None and not one.left for one in answers),
        "wrong": int(((error_N > TOLERANCE) | other_N).sum()),
        "misattributed": sum(mixed_up),
        "uncovered": sum(one["missing"] > 0 for one in covered),
        "max_error": float(error_N.max(initial=0.0)),
        "tolerance": TOLERANCE,
        "different_scores": len(np.unique(want_NH.round(3), axis=0)),
        "zones": {name: zones[name] for name in ZONES},
        "stopped": sum(one["action"] == "stop" for one in said),
        "cached_tokens": sum(one["cached"] for one in covered),
        "scored_tokens": sum(one["scored"] for one in covered),
    }


def _error(found: Floats, want: Floats) -> Floats:
    """Return the largest difference over the heads, as a share of the score if that is above 1; NaN is infinite."""
    error: Floats = np.nan_to_num(np.abs(found - want) / np.abs(want).clip(min=1.0), nan=np.inf).max(-1)
    return error


def _same_zones(one: Answer, want_H: Floats, guard: Guard) -> bool:
    """Whether zones and action are those of the offline scores; a score on a threshold may lie on either side."""
    assert one.said is not None
    worst = 0
    for detector, want in zip(guard.manifest.detectors, want_H, strict=True):
        bucket = detector.calibration.thresholds(len(one.prompt))
        slack = TOLERANCE * max(1.0, abs(want))
        found = ZONES.index(one.said["detectors"][detector.name]["zone"])
        low, high = (ZONES.index(zone(score, bucket)) for score in (want - slack, want + slack))
        if not low <= found <= high:
            return False
        worst = max(worst, found)
    return bool(one.said["zone"] == ZONES[worst]) and (one.said["action"] == "stop") == (worst == 2)


def _unrecorded(answers: list[Answer], events: list[dict[str, Any]]) -> int:
    """Count requests that the audit log does not open and close exactly once."""
    # The engine puts a suffix of its own behind the id that clients see.
    counts = Counter((event["request"].rpartition("-")[0], event["event"]) for event in events)
    return sum((counts[one.id, "open"], counts[one.id, "close"]) != (1, 1) for one in answers)


if __name__ == "__main__":
    typer.run(main)
