"""Tune the additions to a model on lessons, everything else frozen.

    loss = NLL(refusals | harmful prompts)
         + answer_weight * NLL(own answers | benign prompts) + kl_weight * KL(base || model | benign prompts)

Each term is a mean over its tokens. ``accelerate`` runs it on one device or several; of several processes each takes
the mean of its own lessons, and the gradients are averaged.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from pydantic import Field, model_validator
from torch import Tensor, nn

from nest.checkpoint import load_checkpoint, save_checkpoint
from nest.delta import Deltas
from nest.full import Change
from nest.lessons import Batch, Lesson, batches, by_length, collate
from nest.objective import Objective, token_counts
from nest.reference import Reference
from nest.training_mode import checkpointing, frozen
from nest.whitening import WhiteAdamW, keep_bases, kept_bases, white_bases
from spider_sense.config import Settings
from spider_sense.errors import DataError

__all__ = ["LearningRate", "Losses", "TuneConfig", "processes", "tune"]

LearningRate = Annotated[float, Field(gt=0, le=1)]
"""AdamW moves each number by about as much in a step, and no weight is near 1."""


class TuneConfig(Settings):
    """How to tune."""

    steps: int = Field(default=200, gt=0)
    batch_size: int = Field(default=16, gt=1)
    """Lessons of a step, half of them refusals."""
    pass_size: int = Field(default=4, gt=0)
    """Lessons of one pass through the model: a step's lessons are sorted by length and their gradients summed. Small
    passes are little padding, large ones keep a GPU busy."""
    learning_rate: LearningRate = 2e-3
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    whiten: bool = False
    """Step the vectors that inputs are compared with (``down`` of NeST and of LoRA) in coordinates in which the inputs
    are white (``nest.whitening``). The same learning rate then moves them several times as far. Full fine-tuning has no
    such vectors."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; after them it falls as a cosine, to a tenth."""
    answer_weight: float = Field(default=1.0, ge=0, le=1000)
    kl_weight: float = Field(default=0.0, ge=0, le=1000)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    seed: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(default=160, gt=0)
    """Longer prompts are cut in the middle."""
    answer_tokens: int = Field(default=20, gt=0)
    """How much of an answer is learned: whether it refuses is decided in its opening."""
    gradient_checkpointing: bool = False
    save_every: int = Field(default=50, gt=0)

    @model_validator(mode="after")
    def _some_benign_loss(self) -> Self:
        if self.answer_weight == self.kl_weight == 0:
            raise ValueError(
                "answer_weight and kl_weight are both 0, so nothing keeps benign prompts answered and the model would "
                "learn to refuse everything; give one of them a weight, such as answer_weight 1"
            )
        return self


@dataclass(frozen=True, slots=True)
class Losses:
    """The terms of a step's loss, in nats per token."""

    step: int
    refuse: float
    answer: float
    kl: float


def tune(
    model: nn.Module,
    deltas: Change,
    lessons: Sequence[Lesson],
    config: TuneConfig,
    pad: int,
    references: dict[int, Reference] | None = None,
    folder: Path | None = None,
    advance: Callable[[Losses], None] | None = None,
) -> list[Losses]:
    """Train the additions in place.

    Args:
        model: a transformers causal language model; all of its parameters that are not among ``deltas`` are frozen
            meanwhile.
        deltas: what is trained.
        lessons: refusals and answers.
        config: how.
        pad: token id of padding.
        references: base distributions by place in ``lessons``, needed if ``kl_weight`` is not 0.
        folder: where checkpoints go; a run that finds one there goes on from it.
        advance: called after each step.

    Returns:
        The losses of the steps that this call ran.

    Raises:
        DataError: if a kind of lesson is missing, the batch cannot be shared among the processes, or the loss or what
            is trained is not finite; the last checkpoint stays.
        PatchError: if the checkpoint in ``folder`` belongs to another run.
    """
    _check(lessons, config, references)
    with frozen(model, deltas):
        return _tuned(model, deltas, lessons, config, pad, references, folder, advance)


def _tuned(
    model: nn.Module,
    deltas: Change,
    lessons: Sequence[Lesson],
    config: TuneConfig,
    pad: int,
    references: dict[int, Reference] | None,
    folder: Path | None,
    advance: Callable[[Losses], None] | None,
) -> list[Losses]:
    device, state = next(model.parameters()).device, processes(model)
    # One process trains where the model is; several are placed by accelerate.
    accelerator = Accelerator(cpu=device.type == "cpu", device_placement=state.num_processes > 1)
    place = accelerator.device if state.num_processes > 1 else device
    bases = _bases(model, deltas, lessons, folder) if config.whiten and isinstance(deltas, Deltas) else {}
    # Processes may find eigenvectors with other signs.
    bases = {parameter: broadcast(base_DD.to(place)) for parameter, base_DD in bases.items()}
    optimizer = WhiteAdamW(deltas.parameters(), bases, lr=config.learning_rate, weight_decay=config.weight_decay)
    known = references if references and config.kl_weight else {}
    objective = Objective(model, deltas, known, share_head=not config.gradient_checkpointing)
    tuned, prepared = accelerator.prepare(objective, optimizer)
    history = []
    # Checkpointing computes activations again in the backward pass, so the hooks stay for both.
    with deltas.hooked(), checkpointing(model, config.gradient_checkpointing):
        start = load_checkpoint(folder, deltas, optimizer, config) if folder else 0
        for offset, chosen in enumerate(batches(lessons, config.batch_size, config.steps, config.seed, start)):
            mine = _share(chosen, accelerator.process_index, accelerator.num_processes)
            passes = [collate(lessons, part, pad, place) for part in by_length(lessons, mine, config.pass_size)]
            tokens = token_counts(lessons, mine, known)
            losses = _step(accelerator, tuned, prepared, passes, tokens, config, start + offset)
            history.append(losses)
            if advance is not None:
                advance(losses)
            if _is_due(losses.step, config):
                if not all(value.isfinite().all() for value in deltas.parameters()):
                    raise _diverged("a trained number is not finite", losses.step, config)
                if folder and accelerator.is_main_process:
                    save_checkpoint(folder, deltas, optimizer, config, losses.step + 1)
    return history


def _bases(
    model: nn.Module, deltas: Deltas, lessons: Sequence[Lesson], folder: Path | None
) -> dict[nn.Parameter, Tensor]:
    """Return the coordinates of the steps, those of before if the run is resumed."""
    file = None if folder is None else folder.with_name(f"{folder.name}-bases.safetensors")
    if file is not None and file.is_file():
        return kept_bases(file, deltas)
    with checkpointing(model, wanted=False):
        bases = white_bases(model, deltas, lessons)
    if file is not None and processes(model).is_main_process:
        keep_bases(file, deltas, bases)
    return bases


def processes(model: nn.Module) -> PartialState:
    """Return what ``accelerate launch`` started, one process if it did not; with a model on the CPU none has a GPU."""
    return PartialState(cpu=next(model.parameters()).device.type == "cpu")


def _share(chosen: Sequence[int], process: int, processes: int) -> Sequence[int]:
    """Return a process's part of a batch, as large as every other's and, as the whole, half refusals."""
    size = len(chosen) // processes
    if size * processes != len(chosen) or size % 2:
        raise DataError(
            f"{len(chosen)} lessons of a step for {processes} processes; batch_size must be an even number for each"
        )
    return chosen[process * size : (process + 1) * size]


def _is_due(step: int, config: TuneConfig) -> bool:
    return (step + 1) % config.save_every == 0 or step + 1 == config.steps


def _step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    passes: Sequence[Batch],
    tokens: Sequence[int],
    config: TuneConfig,
    step: int,
) -> Losses:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * _schedule(step, config)
    weights = torch.tensor((1.0, config.answer_weight, config.kl_weight), device=accelerator.device)
    share_3 = 1.0 / torch.tensor(tokens, device=accelerator.device)
    terms_3 = torch.zeros(3, device=accelerator.device)
    for batch in passes:
        part_3 = objective(batch) * share_3
        accelerator.backward((weights * part_3).sum())
        terms_3 += part_3.detach()
    terms_3 = accelerator.reduce(terms_3, "mean")
    loss = float((weights * terms_3).sum())
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss}", step, config)
    accelerator.clip_grad_norm_(objective.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return Losses(step, *terms_3.tolist())


def _diverged(what: str, step: int, config: TuneConfig) -> DataError:
    return DataError(f"{what} at step {step} with learning rate {config.learning_rate:g}; lower learning_rate")


def _schedule(step: int, config: TuneConfig) -> float:
    """Return the share of the learning rate at a step."""
    rising = max(1, round(config.warmup * config.steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, config.steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _check(lessons: Sequence[Lesson], config: TuneConfig, references: dict[int, Reference] | None) -> None:
    kinds = {lesson.kind for lesson in lessons}
    if kinds != {"refuse", "answer"}:
        raise DataError(
            f"lessons are of kind {sorted(kinds)}; tuning needs harmful prompts to refuse and benign ones to answer"
        )
    if config.kl_weight and not references:
        raise DataError(f"kl_weight is {config.kl_weight}, but no reference was read; call read_reference first")
