"""What the comparison trains and measures on, in two sizes."""

import hashlib
import json
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from spider_sense.chat import Chat
from spider_sense.cli.progress import progress_bars
from spider_sense.config import Settings
from spider_sense.models import LoadedModel
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.stage import STAGES
from spider_sense.screening.stage_data import StageData, owner, stage_data
from spider_sense.screening.stage_example import StageExample
from spider_sense.screening.stage_examples import stage_examples
from spider_sense.screening.stage_training import StageOptions, crossed, folded, measure_files
from spider_sense.training.collect import collect
from spider_sense.types import Site

__all__ = ["CONSOLE", "FULL", "QUICK", "Size", "captured", "halves_of_requests", "measured", "texts_of", "unseen"]

CONSOLE = Console(stderr=True, width=180)
PAIRED, AGENTS, REQUESTS = "bipia_train", "asb", "tau2_agent_requests"


class Size(Settings):
    """How much is done."""

    sites: tuple[str, ...]
    site: str
    """Of the signatures, one of ``sites``."""
    tokens: int
    """Longer conversations are left out."""
    rows: int
    """Conversations taken of each stage of a file, pairs together; the paired file is taken whole."""
    attacks: int
    """Of each test agent in the traces."""
    requests: int
    """Customers' requests in the traces."""
    asked: int
    """Spans that the served model judges: it takes seconds each."""
    timed: int
    """Benign traces that are timed."""
    repeats: int
    """Times that each of them is timed, without the screen and with it."""
    options: StageOptions = StageOptions()


SITES = ("resid.10", "resid.14", "resid.18", "resid.22")
FULL = Size(sites=SITES, site="resid.18", tokens=400, rows=300, attacks=20, requests=80, asked=24, timed=50, repeats=9)
QUICK = Size(sites=SITES, site="resid.18", tokens=260, rows=60, attacks=8, requests=40, asked=6, timed=20, repeats=5)


def captured(loaded: LoadedModel, data: Path, size: Size, folder: Path) -> dict[str, StageData]:
    """Capture the conversations that are trained and measured on, and cut them to the stages."""
    chat = Chat(loaded.tokenizer)
    examples = [item for item in stage_examples(data) if _length(chat, item) <= size.tokens]
    examples = _fewer(examples, size.rows)
    with progress_bars() as progress:
        found = collect(
            loaded,
            [item.example for item in examples],
            [Site.parse(site) for site in size.sites],
            folder,
            max_tokens=size.tokens,
            progress=progress,
        )
    return {name: stage_data(name, examples, found, loaded.tokenizer) for name in (*STAGES, DRIFT)}


def measured(stage: StageData, size: Size) -> dict[str, Any]:
    """Measure a probe on every file that it has not seen, and on the paired one by context and attack."""
    CONSOLE.log(f"measuring {stage.name}: {int(stage.labels.sum())} attacks, {int((~stage.labels).sum())} harmless")
    result = {"files": measure_files(stage, size.options)}
    if stage.name in ("observation", DRIFT):
        result["within"] = {f"{PAIRED}, other contexts and attacks": crossed(stage, PAIRED, size.options)}
    if stage.name in ("plan", "action"):
        result["within"] = {f"{AGENTS}, other agents": folded(stage, AGENTS, size.options)}
    return result


def unseen(stage: StageData, test_agents: list[str]) -> np.ndarray:
    """Return which examples [N] nothing is made from: half of the agents, and all requests of the customers' desk.

    Half of the requests are replayed as traces; the other is what the thresholds of its operator are set on, and a
    probe that was fitted on them would score them lower than the next.
    """
    left_out: np.ndarray = np.isin(stage.owners, test_agents) | (stage.sources == REQUESTS)
    return left_out


def halves_of_requests(data: Path) -> tuple[list[str], list[str]]:
    """Return the ids of the requests that thresholds are set on, and of those that are replayed."""
    rows = (data / f"{REQUESTS}.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(row)["id"] for row in rows]
    replayed = [name for name in names if _order(f"{REQUESTS}/{name}")[0] >= "8"]
    return [name for name in names if name not in replayed], replayed


def texts_of(stage: StageData, used: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the texts of some examples and their labels."""
    rows = np.flatnonzero(used)
    return [stage.texts[index] for index in rows], stage.labels[rows]


def _fewer(examples: list[StageExample], most: int) -> list[StageExample]:
    """Take so many of each stage of a file but the paired one, by hash, in the order that they came in.

    Of an agent's conversations, which are split as one, as many are taken as of another's, attacks and harmless alike.
    """
    taken: set[str] = set()
    for key in {(item.example.source, item.stage) for item in examples}:
        rows = [item.example for item in examples if (item.example.source, item.stage) == key]
        limit, turns, before = len(rows) if key[0] == PAIRED else most, [], Counter[tuple[str, str]]()
        for row in sorted(rows, key=lambda row: (_order(row.group), row.id)):
            kind = (owner(row.group), row.label)
            turns.append((before[kind], row.id))
            before[kind] += 1
        taken |= {name for _, name in sorted(turns, key=itemgetter(0))[:limit]}
    return [item for item in examples if item.example.id in taken]


def _length(chat: Chat, item: StageExample) -> int:
    return len(chat.render(item.example.turns or item.example.text).ids)


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
