"""Thousands of requests at a guarded vLLM server: random lengths, shared prefixes, clients that hang up.

    python bench/soak.py --requests 2000

Every answer's scores are compared with those of a plain pass of transformers over the same tokens. Run it in the
environment of vLLM. The last line is JSON; `lost`, `wrong` and `uncovered` must be 0.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from _server import CONSOLE, ask, server
from rich.progress import track

from spider_sense.bench import random_guard
from spider_sense.chat import unscored
from spider_sense.corpus import load_corpus
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel, load_model
from spider_sense.offline import whole_logits
from spider_sense.scoring import Bank, Scorer
from spider_sense.types import Site

Answer = dict[str, Any]


def main(
    model: Annotated[str, typer.Option(help="Local folder of a model; smollm2 is the packaged one.")] = "smollm2",
    requests: Annotated[int, typer.Option(help="How many.")] = 2000,
    concurrent: Annotated[int, typer.Option(help="How many at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of lengths, prefixes and hang-ups.")] = 0,
) -> None:
    """Load a guarded server and compare every answer with its offline score."""
    loaded = load_model(model, "float32")
    layers = loaded.model.config.num_hidden_layers
    guard = random_guard(loaded, 16, tuple(Site(place * layers // 4, "resid") for place in range(4)))
    with tempfile.TemporaryDirectory() as folder:
        guard.save_pretrained(Path(folder) / "guard")
        options = ["--scores", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        options += ["--max-num-seqs", str(concurrent), "--max-num-batched-tokens", "256", "--block-size", "32"]
        with server(loaded.model.name_or_path, options, Path(folder, "server"), Path(folder, "guard")) as address:
            answers = asyncio.run(_all(address, requests, concurrent, Random(seed)))  # noqa: S311 - load, not secrets
    finished = [one for one in answers if not one["left"]]
    errors = [_error(one, guard, loaded) for one in track(finished, "comparing", console=CONSOLE)]
    report = {
        "requests": requests,
        "finished": len(finished),
        "left": requests - len(finished),
        "lost": sum(one["said"] is None for one in finished),
        "wrong": sum(error is not None and error > 1e-4 for error in errors),
        "uncovered": sum(bool(one["said"]) and one["said"]["coverage"]["missing"] > 0 for one in finished),
        "cached_tokens": sum(one["said"]["coverage"]["cached"] for one in finished if one["said"]),
        "largest_error": max((error for error in errors if error is not None), default=None),
    }
    typer.echo(json.dumps(report))
    if report["lost"] or report["wrong"] or report["uncovered"]:
        raise typer.Exit(1)


async def _all(address: str, requests: int, concurrent: int, rng: Random) -> list[Answer]:
    from openai import AsyncOpenAI

    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday"]
    openings = [" ".join(rng.sample(texts, rng.randint(1, 8))) for _ in range(12)]
    gate, done = asyncio.Semaphore(concurrent), [0]

    async def one(client: Any, place: int) -> Answer:
        prompt = " ".join(
            (*([rng.choice(openings)] if rng.random() < 0.7 else []), *rng.sample(texts, rng.randint(1, 4)))
        )
        leave_after = rng.randint(1, 6) if rng.random() < 0.15 else None
        async with gate:
            answer = await _stream(
                client, f"{place}" if rng.random() < 0.02 else prompt, rng.randint(1, 24), leave_after
            )
        done[0] += 1
        if done[0] % 100 == 0:
            CONSOLE.print(f"{done[0]} of {requests} requests")
        return answer

    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        return list(await asyncio.gather(*(one(client, place) for place in range(requests))))


async def _stream(client: Any, prompt: str, new_tokens: int, leave_after: int | None) -> Answer:
    stream = await ask(client, prompt, new_tokens, return_token_ids=True)
    answer: Answer = {"prompt": [], "tokens": [], "said": None, "left": False}
    chunks = 0
    async for chunk in stream:
        extra, chunks = chunk.model_extra or {}, chunks + 1
        answer["prompt"] = extra.get("prompt_token_ids") or answer["prompt"]
        for choice in chunk.choices:
            answer["tokens"] += (choice.model_extra or {}).get("token_ids") or []
        answer["said"] = (extra.get("kv_transfer_params") or {}).get("spider_sense", answer["said"])
        if chunks == leave_after and answer["said"] is None:
            answer["left"] = True
            await stream.close()
            break
    return answer


def _error(one: Answer, guard: Guard, loaded: LoadedModel) -> float | None:
    """Return the largest difference to an offline score, over the score if that is above 1; None without a verdict."""
    if one["said"] is None:
        return None
    coverage, prompt = one["said"]["coverage"], one["prompt"]
    ids = (prompt + one["tokens"])[: coverage["scored"] + coverage["cached"]]
    bank, template = Bank(guard.probes), guard.manifest.template
    scorer = Scorer(bank)
    request = scorer.open("offline", len(prompt), unscored(template.head, prompt), template.tail)
    want_H, _ = scorer.score_sequence(whole_logits(bank, loaded, ids), request)
    found_H = torch.tensor([float(found["score"]) for found in one["said"]["detectors"].values()])
    return float(((found_H - want_H).abs() / want_H.abs().clamp(min=1.0)).max())


if __name__ == "__main__":
    typer.run(main)
