"""Screening of agents: what the probes of the stages are worth, and the cascade against each of its parts.

    python bench/screening.py [--quick]

Reads the prompt sets in SPIDER_SENSE_DATA. Captured activations are kept in the output folder and taken up again where
they are still of the same tokens and model. The last line is one JSON object.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from _arms import WordsJudge
from _bank import signature_bank
from _judge import model_judge
from _picture import draw
from _replay import Timing, compare, shipped, sighted, timed
from _stages import CONSOLE, FULL, QUICK, Size, captured, halves_of_requests, measured, texts_of, unseen
from _traces import TRAINED, traces
from rich.table import Table

from spider_sense.baselines import TfidfBaseline
from spider_sense.models import LoadedModel, load_model
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.protocols import Judge
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.stage import STAGES
from spider_sense.screening.stage_calibration import calibrate_stages
from spider_sense.screening.stage_training import assembled, make_stage
from spider_sense.screening.trace import Trace
from spider_sense.types import Site

REFERENCE, SERVED, OWN, KNOWN = "words", "SmolLM2", "own traffic", "wording of training"
Served = Callable[[], AbstractContextManager[Judge]]


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
    judge = partial(model_judge, "smollm2", SERVED)
    print(json.dumps(run(load_model("smollm2"), Path(data), size, folder, judge)))  # noqa: T201 - the result


def run(loaded: LoadedModel, data: Path, size: Size, folder: Path, served: Served) -> dict[str, Any]:
    """Run the comparison.

    Args:
        loaded: the model that is watched.
        data: folder of the prompt sets.
        size: how much is done.
        folder: for activations, probes and the picture.
        served: starts a judge that asks a language model.

    Returns:
        The last line.
    """
    stages = captured(loaded, data, size, folder / "activations")
    results = {name: measured(stage, size) for name, stage in stages.items()}
    show_probes(results)
    (folder / "probes.json").write_text(json.dumps(results), encoding="utf-8")
    agents = sorted(set(stages["action"].owners))
    left_out = {name: unseen(stage, agents[1::2]) for name, stage in stages.items()}
    made = [make_stage(stage, left_out[name], results[name], size.options) for name, stage in stages.items()]
    guard = assembled(loaded, made, {"test_agents": agents[1::2], "size": size.model_dump(mode="json")})
    guard.guard.save_pretrained(folder / "guard")
    bank = signature_bank(loaded, stages, {name: ~rows for name, rows in left_out.items()}, Site.parse(size.site))
    CONSOLE.log(f"replaying: {len(bank.signatures)} signatures")
    names = [name.partition(":")[2] for name in agents]
    own, kept = halves_of_requests(data)
    replayed = traces(data, names[1::2], kept[: size.requests], size.attacks)
    reader = ChatSpans(loaded.tokenizer)
    traffic = own_traffic(data, names[::2], own)
    unset = ModelSense(loaded, guard, bank.site)
    calibrated = calibrate_stages(guard, loaded, reader, traffic)
    CONSOLE.log(f"thresholds set on {calibrated.guard.manifest.training['recalibrated_on']['spans']}")
    sense = ModelSense(loaded, calibrated, bank.site)
    sights = [sighted(reader, (unset, sense), trace) for trace in replayed]
    before, seen = ([item for both in sights for item in both[place]] for place in range(2))
    suspects = {item.trace.id for item in seen if item.sensed.zone != "clear"}
    clear = [trace for trace in replayed if trace.attacked is None and trace.id not in suspects]
    screen = shipped(reader, sense, bank)
    timings = [timed(reader, sense, screen, trace, size.repeats) for trace in clear[: size.timed]]
    CONSOLE.log(f"judging {len(seen)} spans of {len(replayed)} traces")
    words = {name: TfidfBaseline.fit(*texts_of(stages[name], ~left_out[name])) for name in STAGES}
    with served() as judge:
        compared = compare(before, bank, {REFERENCE: WordsJudge(words), SERVED: judge}, SERVED, size.asked)
    own_arms = compare(seen, bank, {REFERENCE: WordsJudge(words)}, SERVED, size.asked)
    compared |= {f"{name}, {OWN}": own_arms[name] for name in ("probe alone", f"cascade ({REFERENCE})")}
    in_training = traces(data, names[1::2], kept[: size.requests], size.attacks, TRAINED)
    known = [item for trace in in_training for item in sighted(reader, (unset,), trace)[0]]
    known_arms = compare(known, bank, {REFERENCE: WordsJudge(words)}, SERVED, size.asked)
    CONSOLE.log("done")
    every = compared | {f"{name}, {KNOWN}": arm for name, arm in known_arms.items()}
    show_arms(every)
    draw(compared, results, folder / "screening.png")
    return summary(results, every, timings)


def own_traffic(data: Path, agents: list[str], requests: list[str]) -> list[Trace]:
    """Return what an operator has to set thresholds on: benign traces of agents and of the customers' desk."""
    return [Trace(id=item.id, messages=item.messages) for item in traces(data, agents, requests, attacks=0)]


def summary(results: dict[str, Any], compared: dict[str, dict[str, Any]], timings: list[Timing]) -> dict[str, Any]:
    """Return the last line."""
    paired, unset = next(iter(results[DRIFT]["within"].values())), compared[f"cascade ({REFERENCE})"]
    cascade = compared[f"cascade ({REFERENCE}), {OWN}"]
    hardest = min(results[DRIFT]["files"], key=lambda name: results[DRIFT]["files"][name]["guard"]["auroc"])
    return {
        "drift_auroc": paired["guard"]["auroc"],
        "drift_auroc_interval": paired["interval"],
        "drift_tpr_at_1fpr": paired["guard"]["tpr_at_1pct_fpr"]["value"],
        "drift_clean": paired["guard"]["n"] - paired["guard"]["positives"],
        "length_auroc": paired["length"]["auroc"],
        "tfidf_auroc": paired["tfidf"]["auroc"],
        "hardest_file": hardest,
        "hardest_file_auroc": results[DRIFT]["files"][hardest]["guard"]["auroc"],
        "attack_success": cascade["attack_success"]["value"],
        "false_positives": cascade["false_positives"]["value"],
        "escalated_share": cascade["escalated_share"]["value"],
        "attack_success_uncalibrated": unset["attack_success"]["value"],
        "false_positives_uncalibrated": unset["false_positives"]["value"],
        "escalated_share_uncalibrated": unset["escalated_share"]["value"],
        "timed_traces": len(timings),
        **latency(timings),
        "judge": f"{REFERENCE}: TF-IDF, no language model",
        "arms": compared,
    }


def latency(timings: list[Timing]) -> dict[str, float | None]:
    """Return what the screen adds, as shares of a pass: each trace's median, and beside it what that evens out."""

    def over(values: Iterable[float], percent: float) -> float | None:
        found = list(values)
        return float(np.percentile(found, percent)) if found else None

    return {
        "added_latency_median_ratio": over((item.added for item in timings), 50),
        "added_latency_p99_ratio": over((item.added for item in timings), 99),
        "added_latency_worst_ratio": over((item.added for item in timings), 100),
        "added_latency_p99_ratio_fastest": over((item.fastest for item in timings), 99),
        "added_latency_p99_ratio_single": over((share for item in timings for share in item.shares), 99),
        "pass_seconds_median": over((second for item in timings for second in item.bare), 50),
        "check_seconds_median": over((second for item in timings for second in item.check), 50),
    }


def show_probes(results: dict[str, Any]) -> None:
    """Print what each probe is worth, its controls beside it.

    Fewer than a hundred harmless rows cannot show 1% of false positives: there it is what is caught at none.
    """
    table = Table("probe", "measured on", "AUROC", "TPR at 1% FPR", "length", "TF-IDF", "random", "shuffled")
    for name, result in results.items():
        rows = {**result["files"], **result.get("within", {})}
        for source, item in rows.items():
            rate, clean = item["guard"]["tpr_at_1pct_fpr"], item["guard"]["n"] - item["guard"]["positives"]
            at = f" at 0 of {clean}" if clean < 100 else ""
            table.add_row(
                name,
                f"{source} ({item['guard']['positives']}/{item['guard']['n']})",
                f"{item['guard']['auroc']:.3f} [{item['interval']['low']:.3f}, {item['interval']['high']:.3f}]",
                f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]{at}",
                *(f"{item[key]['auroc']:.3f}" for key in ("length", "tfidf", "random_direction", "shuffled_labels")),
            )
    CONSOLE.print(table)


def show_arms(compared: dict[str, dict[str, Any]]) -> None:
    """Print what each arm let through and stopped."""
    table = Table("arm", "attack success", "false positives", "escalated", "median s", "p99 s")
    for name, arm in compared.items():
        shares = [arm[key] for key in ("attack_success", "false_positives", "escalated_share")]
        texts = [
            f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}] of {share['n']}, {share['distinct']} texts"
            for share in shares
        ]
        table.add_row(name, *texts, f"{arm['seconds']['median']:.4f}", f"{arm['seconds']['p99']:.4f}")
    CONSOLE.print(table)


if __name__ == "__main__":
    typer.run(main)
