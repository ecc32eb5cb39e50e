"""Screening of agents: what the probes of the stages are worth, and the cascade against each of its parts.

    python bench/screening.py [--quick]

Reads the prompt sets in SPIDER_SENSE_DATA. Captured activations are kept in the output folder and taken up again where
they are still of the same tokens and model. The last line is one JSON object.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _arms import Sighting, WordsJudge, arms, summarise
from _bank import signature_bank
from _judge import model_judge
from _picture import draw
from _traces import BenchTrace, traces
from rich.console import Console
from rich.table import Table

from spider_sense.baselines import TfidfBaseline
from spider_sense.chat import Chat
from spider_sense.cli.train import progress_bars
from spider_sense.config import Settings
from spider_sense.models import LoadedModel, load_model
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.cascade import Cascade
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.protocols import Judge
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.screening.stage import STAGES
from spider_sense.screening.stage_data import StageData, stage_data
from spider_sense.screening.stage_examples import StageExample, stage_examples
from spider_sense.screening.stage_training import StageOptions, assembled, crossed, make_stage, measure_files
from spider_sense.training.collect import collect
from spider_sense.types import Site

CONSOLE = Console(stderr=True)
PAIRED = "bipia_train"
REFERENCE, SERVED = "words", "SmolLM2"
SIGNATURE_SITE = Site(layer=18, place="resid")


class Size(Settings):
    """How much is done."""

    sites: tuple[str, ...]
    tokens: int
    """Longer conversations are left out."""
    groups: int
    """Groups (contexts, pairs, texts) taken of each file."""
    rows: int
    """Conversations taken of each stage of a file."""
    attacks: int
    """Of each test agent in the traces."""
    requests: int
    """Customers' requests in the traces."""
    asked: int
    """Spans that the served model judges: it takes seconds each."""
    timed: int
    """Benign traces that are timed."""
    options: StageOptions = StageOptions()


FULL = Size(
    sites=("resid.6", "resid.10", "resid.14", "resid.18", "resid.22", "resid.26"),
    tokens=400,
    groups=1000,
    rows=1000,
    attacks=20,
    requests=40,
    asked=24,
    timed=24,
)
QUICK = Size(
    sites=("resid.10", "resid.14", "resid.18", "resid.22"),
    tokens=260,
    groups=70,
    rows=100,
    attacks=8,
    requests=12,
    asked=8,
    timed=12,
    options=StageOptions(folds=2),
)


def main(
    quick: Annotated[bool, typer.Option(help="A reduced run of minutes.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for activations, probes and the picture.")] = Path(
        "runs/screening"
    ),
) -> None:
    """Train, measure, replay, print."""
    size, folder = (QUICK, output / "quick") if quick else (FULL, output / "full")
    data = os.environ.get("SPIDER_SENSE_DATA")
    if not data:
        raise typer.BadParameter("SPIDER_SENSE_DATA is not set; name the folder of the prompt sets")
    loaded = load_model("smollm2")
    stages = captured(loaded, Path(data), size, folder / "activations")
    results = {name: measured(stage, size) for name, stage in stages.items()}
    show_probes(results)
    agents = sorted({group for group in stages["action"].groups if group.startswith("asb:")})
    test_agents = agents[1::2]
    left_out = {name: unseen(stage, test_agents) for name, stage in stages.items()}
    made = [make_stage(stage, left_out[name], results[name], size.options) for name, stage in stages.items()]
    guard = assembled(loaded, made, {"test_agents": test_agents, "size": size.model_dump(mode="json")})
    guard.guard.save_pretrained(folder / "guard")
    bank = signature_bank(loaded, stages, {name: ~rows for name, rows in left_out.items()}, SIGNATURE_SITE)
    requests = half_of_requests(Path(data))[: size.requests]
    replayed = traces(Path(data), [name.removeprefix("asb:") for name in test_agents], requests, size.attacks)
    reader, sense = ChatSpans(loaded.tokenizer), ModelSense(loaded, guard, bank.site)
    seen = [item for trace in replayed for item in sighted(reader, sense, trace)]
    suspects = {item.trace.id for item in seen if item.sensed.zone != "clear"}
    clear = [trace for trace in replayed if trace.attacked is None and trace.id not in suspects]
    latency = [added_share(reader, sense, bank, trace) for trace in clear[: size.timed]]
    words = {name: TfidfBaseline.fit(*texts_of(stages[name], ~left_out[name])) for name in STAGES}
    compared = compare(seen, bank, WordsJudge(words), size)
    show_arms(compared)
    draw(compared, results, folder / "screening.png")
    print(json.dumps(summary(results, compared, latency)))  # noqa: T201 - the result


def captured(loaded: LoadedModel, data: Path, size: Size, folder: Path) -> dict[str, StageData]:
    """Capture the conversations that are trained and measured on, and cut them to the stages."""
    chat, taken = Chat(loaded.tokenizer), set[str]()
    examples = stage_examples(data)
    for source in dict.fromkeys(item.example.source for item in examples):
        groups = sorted({item.example.group for item in examples if item.example.source == source}, key=_order)
        taken |= set(groups[: size.groups])
    examples = [item for item in examples if item.example.group in taken and _length(chat, item) <= size.tokens]
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
    CONSOLE.print(f"measuring {stage.name}: {int(stage.labels.sum())} attacks, {int((~stage.labels).sum())} harmless")
    result = {"files": measure_files(stage, size.options)}
    if stage.name in ("observation", DRIFT):
        result["crossed"] = {PAIRED: crossed(stage, PAIRED, size.options)}
    return result


def unseen(stage: StageData, test_agents: list[str]) -> np.ndarray:
    """Return which examples [N] are kept for the traces: half of the agents, half of the requests."""
    requests = [
        item.example.source == "tau2_agent_requests" and _order(item.example.id)[0] >= "8" for item in stage.examples
    ]
    return np.isin(stage.groups, test_agents) | np.array(requests)


def half_of_requests(data: Path) -> list[str]:
    """Return the ids of the requests that :func:`unseen` keeps for the traces."""
    rows = (data / "tau2_agent_requests.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(row)["id"] for row in rows]
    return [name for name in names if _order(f"tau2_agent_requests/{name}")[0] >= "8"]


def texts_of(stage: StageData, used: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the texts of some examples and their labels."""
    rows = np.flatnonzero(used)
    return [stage.texts[index] for index in rows], stage.labels[rows]


def sighted(reader: ChatSpans, sense: ModelSense, trace: BenchTrace) -> list[Sighting]:
    """Run a trace through the model and return what is sensed of each span."""
    conversation = reader.read(trace.messages)
    seen = []
    for span, text, item in zip(conversation.spans, conversation.texts, sense.sense(conversation), strict=True):
        purpose = "" if span.stage == "query" else trace.messages[0].content
        seen.append(Sighting(trace, Artifact(span=span, text=text, purpose=purpose), item))
    return seen


@torch.inference_mode()
def added_share(
    reader: ChatSpans, sense: ModelSense, bank: SignatureBank, trace: BenchTrace, repeats: int = 5
) -> float:
    """Return the time that sensing and matching add to the model's own pass over a trace, as a share of that pass.

    Bare and sensed passes alternate, and the fastest of each counts: what else the machine does only ever adds.
    """
    conversation, cascade = reader.read(trace.messages), Cascade(matcher=bank)
    bare, sensed = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        sense.run(conversation.ids)
        bare.append(time.perf_counter() - start)
        with sense.attached():
            start = time.perf_counter()
            sense.run(conversation.ids)
            found = sense.read(conversation)
            for span, text, item in zip(conversation.spans, conversation.texts, found, strict=True):
                cascade.decide(Artifact(span=span, text=text), item)
            sensed.append(time.perf_counter() - start)
    return min(sensed) / min(bare) - 1


def compare(seen: list[Sighting], bank: SignatureBank, words: Judge, size: Size) -> dict[str, dict[str, Any]]:
    """Let every arm decide; those that the served model judges decide on a part of the spans, half of them attacks."""
    of_all = arms(bank, {REFERENCE: words})
    result = {name: summarise(seen, [arm(item) for item in seen]) for name, arm in of_all.items()}
    attacks = [item for item in seen if item.attack]
    benign = [item for item in seen if item.trace.attacked is None]
    part = [*_spread(attacks, size.asked // 2), *_spread(benign, size.asked // 2)]
    with model_judge("smollm2", SERVED) as judge:
        for name, arm in arms(bank, {SERVED: judge}).items():
            if SERVED in name:
                result[name] = summarise(part, [arm(item) for item in part])
    return result


def summary(results: dict[str, Any], compared: dict[str, dict[str, Any]], latency: list[float]) -> dict[str, Any]:
    """Return the last line."""
    paired, cascade = results[DRIFT]["crossed"][PAIRED], compared[f"cascade ({REFERENCE})"]
    hardest = min(results[DRIFT]["files"], key=lambda name: results[DRIFT]["files"][name]["guard"]["auroc"])
    return {
        "drift_auroc": paired["guard"]["auroc"],
        "drift_auroc_interval": paired["interval"],
        "drift_tpr_at_1fpr": paired["guard"]["tpr_at_1pct_fpr"]["value"],
        "length_auroc": paired["length"]["auroc"],
        "tfidf_auroc": paired["tfidf"]["auroc"],
        "hardest_file": hardest,
        "hardest_file_auroc": results[DRIFT]["files"][hardest]["guard"]["auroc"],
        "attack_success": cascade["attack_success"]["value"],
        "false_positives": cascade["false_positives"]["value"],
        "escalated_share": cascade["escalated_share"]["value"],
        "added_latency_median_ratio": float(np.median(latency)) if latency else None,
        "added_latency_p99_ratio": float(np.percentile(latency, 99)) if latency else None,
        "judge": f"{REFERENCE}: TF-IDF, no language model",
        "arms": compared,
    }


def show_probes(results: dict[str, Any]) -> None:
    """Print what each probe is worth, its controls beside it."""
    table = Table("probe", "measured on", "AUROC", "TPR at 1% FPR", "length", "TF-IDF", "random", "shuffled")
    for name, result in results.items():
        rows = {**result["files"], **{f"{key}, crossed": value for key, value in result.get("crossed", {}).items()}}
        for source, item in rows.items():
            rate = item["guard"]["tpr_at_1pct_fpr"]
            table.add_row(
                name,
                f"{source} ({item['guard']['positives']}/{item['guard']['n']})",
                f"{item['guard']['auroc']:.3f} [{item['interval']['low']:.3f}, {item['interval']['high']:.3f}]",
                f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]",
                *(f"{item[key]['auroc']:.3f}" for key in ("length", "tfidf", "random_direction", "shuffled_labels")),
            )
    CONSOLE.print(table)


def show_arms(compared: dict[str, dict[str, Any]]) -> None:
    """Print what each arm let through and stopped."""
    table = Table("arm", "attack success", "false positives", "escalated", "median s", "p99 s")
    for name, arm in compared.items():
        shares = [arm[key] for key in ("attack_success", "false_positives", "escalated_share")]
        texts = [f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}] of {share['n']}" for share in shares]
        table.add_row(name, *texts, f"{arm['seconds']['median']:.4f}", f"{arm['seconds']['p99']:.4f}")
    CONSOLE.print(table)


def _spread(items: list[Sighting], count: int) -> list[Sighting]:
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, min(count, len(items)))]


def _fewer(examples: list[StageExample], most: int) -> list[StageExample]:
    """Take so many of each stage of a file, by hash, in the order that they came in."""
    taken: set[str] = set()
    for key in {(item.example.source, item.stage) for item in examples}:
        names = [item.example.id for item in examples if (item.example.source, item.stage) == key]
        taken |= set(sorted(names, key=_order)[:most])
    return [item for item in examples if item.example.id in taken]


def _length(chat: Chat, item: StageExample) -> int:
    return len(chat.render(item.example.turns or item.example.text).ids)


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


if __name__ == "__main__":
    typer.run(main)
