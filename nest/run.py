"""From grouped neurons and prompts to a patch."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import Progress

from nest.curriculum import make_curriculum, own_answers
from nest.delta import patch_targets, shared_deltas
from nest.lessons import Lesson
from nest.neurons import Neurons, NeuronSet
from nest.parts import key_of
from nest.reference import Reference, keep_references, kept_references, read_reference
from nest.tune import Losses, TuneConfig, processes, tune
from spider_sense.data import Example, digest
from spider_sense.fingerprint import Fingerprint, check_match, fingerprint
from spider_sense.models import LoadedModel
from spider_sense.patch import KIND, NeuronPatch, PatchManifest

__all__ = ["read_lessons", "tune_patch"]


def tune_patch(
    loaded: LoadedModel,
    neurons: NeuronSet,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    config: TuneConfig,
    work: Path,
    progress: Progress,
) -> NeuronPatch:
    """Tune the shared vectors of grouped neurons.

    Args:
        loaded: the base model; it is left as it was.
        neurons: from :func:`nest.group.group`.
        harmful: prompts to refuse.
        benign: prompts to go on answering.
        config: how.
        work: folder for what the base model says and for checkpoints; a run that was interrupted goes on from it.
        progress: where the bars are shown.

    Raises:
        MismatchError: if the neurons are another model's.
    """
    found = fingerprint(loaded)
    check_match(neurons.manifest.base, found, "rows of one model mean nothing in another; run `nest find` on this one")
    lessons, references = read_lessons(loaded, found, harmful, benign, config, work, progress)
    deltas = shared_deltas(loaded.model, neurons)
    run = key_of(lessons, config.model_dump(), [_rows(one) for one in neurons.sites.values()])
    bar = progress.add_task("tuning", total=config.steps)

    def advance(losses: Losses) -> None:
        text = f"tuning: refuse {losses.refuse:.2f}, answer {losses.answer:.2f}, KL {losses.kl:.3f}"
        progress.update(bar, completed=losses.step + 1, description=text)

    history = tune(loaded.model, deltas, lessons, config, _pad(loaded), references, work / f"checkpoint-{run}", advance)
    share = deltas.count() / sum(parameter.numel() for parameter in loaded.model.parameters())
    manifest = PatchManifest(
        schema_version=KIND.version,
        base=found,
        sites=tuple(map(str, neurons.sites)),
        trained_parameters=deltas.count(),
        trained_share=share,
        recipe={
            "find": neurons.manifest.recipe,
            "group": {key: value for key, value in (neurons.manifest.grouping or {}).items() if key != "silhouette"},
            "tune": config.model_dump(),
            "harmful": len(harmful),
            "benign": len(benign),
            "prompts_digest": digest([*harmful, *benign]),
        },
        evidence={"last_losses": [[one.refuse, one.answer, one.kl] for one in history[-1:]]},
    )
    return NeuronPatch(manifest, patch_targets(deltas, neurons))


def read_lessons(
    loaded: LoadedModel,
    found: Fingerprint,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    config: TuneConfig,
    work: Path,
    progress: Progress,
) -> tuple[list[Lesson], dict[int, Reference]]:
    """Return the lessons and, if the divergence counts, the base model's distributions along its answers."""
    bar = progress.add_task("asking the base model", total=len(benign))
    # Of several processes one asks, and the others find its answers in the file.
    with processes(loaded.model).main_process_first():
        answers = own_answers(
            loaded,
            benign,
            found.weight_digest,
            work / "answers.jsonl",
            config.answer_tokens,
            config.prompt_tokens,
            advance=lambda done: progress.advance(bar, done),
        )
    lessons = make_curriculum(loaded, harmful, benign, answers, config.prompt_tokens, config.answer_tokens)
    if not config.kl_weight:
        return lessons, {}
    file = work / f"references-{key_of(found.weight_digest, lessons)}.safetensors"
    bar = progress.add_task("reading its distributions", total=len(benign))
    with processes(loaded.model).main_process_first():
        if file.is_file():
            return lessons, kept_references(file)
        advance = partial(progress.advance, bar)
        references = read_reference(loaded.model, lessons, _pad(loaded), advance=advance)
        if references:
            keep_references(file, references)
    return lessons, references


def _rows(found: Neurons) -> list[list[int]]:
    clusters = found.neuron_R if found.cluster_R is None else found.cluster_R
    return [found.neuron_R.tolist(), clusters.tolist()]


def _pad(loaded: LoadedModel) -> int:
    return int(loaded.tokenizer.pad_token_id)
