"""``nest eval``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest.cli.app import app, console
from spider_sense.cli.progress import progress_bars

if TYPE_CHECKING:
    from torch import Tensor

    from nest.eval_config import EvalConfig, EvalSets
    from nest.measurements import Arm, Progress
    from nest.refusal_classifier import RefusalClassifier
    from spider_sense.data import Example
    from spider_sense.models import LoadedModel
    from spider_sense.types import Site

__all__ = ["evaluate"]


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    harmful: Annotated[list[str], typer.Option(help="JSONL file of harmful prompts; repeat it.")],
    benign: Annotated[list[str], typer.Option(help="JSONL file of ordinary prompts; repeat it.")],
    out: Annotated[Path, typer.Option(help="Result file; parts that it holds already are not measured again.")],
    jailbreak: Annotated[list[str] | None, typer.Option(help="Jailbreak wrappers; repeat it.")] = None,
    borderline: Annotated[list[str] | None, typer.Option(help="Benign prompts that look harmful; repeat it.")] = None,
    utility: Annotated[list[Path] | None, typer.Option(help="Task files, or a folder of util_*.jsonl; repeat.")] = None,
    patch: Annotated[Path | None, typer.Option(help="Patch folder; its base is measured without it.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength; by default what the patch is meant for.")] = None,
    attacks: Annotated[str, typer.Option(help="Of prefill, ablation, neurons, fine_tuning, with commas between.")] = "",
    labelled: Annotated[
        list[str] | None, typer.Option(help="Prompt sets with or without responses, to train the judge.")
    ] = None,
    judge: Annotated[Path | None, typer.Option(help="Folder of the trained judge; made if there is none.")] = None,
    phrases_only: Annotated[bool, typer.Option(help="Judge by the phrase list alone.")] = False,
    limit: Annotated[int | None, typer.Option(help="Rows of each file, drawn by hash; 0 for all.", min=0)] = 100,
    tokens: Annotated[int, typer.Option(help="New tokens of an answer.", min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Of the rows and the bootstrap.")] = 0,
    answers: Annotated[bool, typer.Option(help="Keep the answers in the result.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Measure a model, with or without a patch: attacks, over-refusal, utility, perplexity."""
    from nest.cli.eval_tables import result_table
    from nest.eval_config import EvalConfig, attacks_named, select_sets
    from nest.evaluate import evaluate as run
    from nest.parts import PartStore
    from nest.refusal_classifier import KIND
    from nest.tasks import read_tasks
    from spider_sense.models import load_model
    from spider_sense.training.config import read_sets

    store = PartStore(out)
    if judge is not None and not phrases_only:
        KIND.check_replaceable(judge)
    config = EvalConfig(
        limit=limit or None, seed=seed, tokens=tokens, attacks=attacks_named(attacks), keep_answers=answers
    )
    groups = {"harmful": harmful, "jailbreak": jailbreak, "benign": benign, "borderline": borderline}
    sets = select_sets(
        config,
        tasks=read_tasks(utility or []),
        **{part: _rows(part, read_sets(tuple(paths or ()))) for part, paths in groups.items()},
    )
    answered = _rows("labelled", read_sets(tuple(labelled or ())))
    loaded = load_model(model, dtype, device)
    second = None if phrases_only else _classifier(loaded, judge, answered, seed)
    arm = _arm(loaded, patch, alpha)
    with _bars(sets, config) as progress:
        result = run(loaded, sets, config, arm=arm, classifier=second, store=store, progress=progress)
    console.print(result_table(result))
    console.print(f"wrote {out}", markup=False)
    if store.replaced:
        console.print(f"replaced, as of another model or other settings: {', '.join(store.replaced)}", markup=False)
    if store.kept:
        console.print(
            f"not asked for, so no part of the figures, but kept in the file: {', '.join(store.kept)}", markup=False
        )
    if as_json:
        typer.echo(json.dumps({name: value for name, value in result.items() if name not in ("rows", "kept")}))


def _rows(part: str, files: "Mapping[str, list[Example]]") -> "list[Example]":
    from spider_sense.errors import DataError

    empty = [name for name, rows in files.items() if not rows]
    if empty:
        raise DataError(f"no prompt in {empty[0]!r} of --{part}; name a file that has some, or leave it out")
    return [row for rows in files.values() for row in rows]


def _arm(loaded: "LoadedModel", patch: Path | None, alpha: float | None) -> "Arm":
    """Put the patch into the model, and return what is measured."""
    from nest.divergence import patch_off
    from nest.measurements import Arm
    from spider_sense.errors import ConfigError
    from spider_sense.fingerprint import fingerprint
    from spider_sense.patch import NeuronPatch
    from spider_sense.patching import apply_patch

    weights = fingerprint(loaded).weight_digest
    if patch is None:
        if alpha is not None:
            raise ConfigError(f"--alpha {alpha:g} is the strength of a patch; name one with --patch, or leave it out")
        return Arm(identity={"weights": weights, "patch": None}, redetect=_redetect)
    applied = apply_patch(loaded, NeuronPatch.from_pretrained(patch), alpha)
    manifest = applied.patch.manifest
    identity = {
        "weights": weights,
        "patch": applied.patch.digest,
        "alpha": applied.alpha,
        "trained_parameters": manifest.trained_parameters,
        "trained_share": manifest.trained_share,
        "patch_bytes": sum(file.stat().st_size for file in patch.iterdir() if file.is_file()),
    }
    return Arm(identity=identity, off=lambda: patch_off(applied), redetect=_redetect)


def _redetect(loaded: "LoadedModel", harmful: "Sequence[Example]", benign: "Sequence[Example]") -> "dict[Site, Tensor]":
    """Look for neurons as ``nest find`` does by default."""
    from nest.find import FindConfig, find

    return {site: found.neuron_R for site, found in find(loaded, harmful, benign, FindConfig()).sites.items()}


def _classifier(
    base: "LoadedModel", folder: Path | None, answered: "Sequence[Example]", seed: int
) -> "RefusalClassifier":
    """Read the judge, or train it on the answers that come with this project, those in the rows, and the model's."""
    from nest.labelled_answers import labelled_answers, own_answers, sample_answers
    from nest.refusal_classifier import KIND, RefusalClassifier

    if folder is not None and (folder / KIND.manifest).is_file():
        return RefusalClassifier.from_pretrained(folder)
    answers = sample_answers() + labelled_answers(answered, seed) + own_answers(base, answered, seed)
    judge = RefusalClassifier.fit(answers, seed)
    if folder is not None:
        judge.save_pretrained(folder)
    return judge


@contextmanager
def _bars(sets: "EvalSets", config: "EvalConfig") -> "Iterator[Progress]":
    """Show a bar for each part, from the moment that it begins to move."""
    with progress_bars() as bars:
        shown: dict[str, Any] = {}

        def tell(part: str, done: int, total: int) -> None:
            if part not in shown:
                shown[part] = bars.add_task(part, total=total)
            bars.advance(shown[part], done)

        yield tell
