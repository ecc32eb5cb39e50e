"""AdamW that steps in coordinates in which the inputs of a projection are white.

A tuned vector is compared with the inputs of its projection. What these have in common is far larger than what tells
one prompt from another, so plain steps move how much the model refuses before they move what it refuses. With
A = mean of x x^T over the inputs (the input factor of K-FAC, arXiv 1503.05671) and A = Q L Q^T, the vector is
u = Q L^(-1/2) w, and AdamW steps w. Directions that hardly any input has are left alone; noise is learned there.

Shape letters: K clusters or rank, D inputs of a projection, T tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nest.delta import Deltas
from nest.lessons import Lesson
from spider_sense.errors import ConfigError

__all__ = ["WhiteAdamW", "keep_bases", "kept_bases", "white_bases"]

LESSONS = 128
"""Lessons whose inputs are looked at, or all if there are fewer."""
_LEAST = 1e-3
"""Of the mean variance: directions with less are left alone."""


class WhiteAdamW(torch.optim.AdamW):
    """AdamW over parameters of which some are stepped in other coordinates.

    Weight decay acts on the parameters themselves, as does what clips gradients before a step.

    Args:
        parameters: what is tuned.
        bases: by parameter [K, D] its coordinates [D, D]: u = w @ base.T.
        options: of AdamW.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], bases: Mapping[nn.Parameter, Tensor], **options: Any
    ) -> None:
        super().__init__(parameters, **options)
        self._bases = dict(bases)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step once; moments are kept in the coordinates of the steps."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = {}
        for parameter, base_DD in self._bases.items():
            if parameter.grad is not None:
                before[parameter] = parameter.clone()
                parameter.grad = parameter.grad @ base_DD
                # From zero, what AdamW leaves there is the step.
                parameter.zero_()
        super().step()
        for group in self.param_groups:
            decayed = 1 - group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter in before:
                    parameter.copy_(before[parameter] * decayed + parameter @ self._bases[parameter].T)
        return loss


@torch.no_grad()
def white_bases(model: nn.Module, deltas: Deltas, lessons: Sequence[Lesson]) -> dict[nn.Parameter, Tensor]:
    """Return the coordinates of each addition's vectors, from the model's activations.

    They are scaled so that inputs of the same variance in every direction would leave a step as large as it is. Of an
    8B model they take 2 GB, as gate and up of a block share theirs, and 9 GB while they are made.

    Args:
        model: a transformers causal language model, in evaluation mode.
        deltas: not hooked.
        lessons: prompts with answers.

    Raises:
        ConfigError: if one is inside an expert, which sees too few tokens for it, or where no token comes by.
    """
    if any(delta.expert is not None for delta in deltas):
        raise ConfigError(
            "whiten is for projections that read every token, and an expert reads those that are sent to it; set "
            "whiten: false, with a learning rate for it"
        )
    sums: dict[nn.Parameter, Tensor] = {}

    def reading(parameter: nn.Parameter) -> Any:
        def read(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x_TD = args[0].flatten(0, -2).double()
            sums[parameter] = sums.get(parameter, 0) + x_TD.T @ x_TD

        return read

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for delta in deltas:
            stack.enter_context(delta.target.register_forward_hook(reading(delta.down_KD)))
        # One at a time, so that no padding is read.
        for lesson in _spread(lessons):
            model(input_ids=torch.tensor([lesson.prompt + lesson.answer], device=device), use_cache=False)
    bases: dict[nn.Parameter, Tensor] = {}
    last_DD, base_DD = None, torch.empty(0)
    for delta in deltas:
        if delta.down_KD not in sums:
            raise ConfigError("an addition is to a projection that the text never passes; leave it out")
        sum_DD = sums.pop(delta.down_KD)
        if last_DD is None or not torch.equal(last_DD, sum_DD):
            last_DD, base_DD = sum_DD, _base(sum_DD)
        bases[delta.down_KD] = base_DD
    return bases


def keep_bases(file: Path, deltas: Deltas, bases: Mapping[nn.Parameter, Tensor]) -> None:
    """Write coordinates: the moments of a run that is resumed mean nothing in others, and these are not unique."""
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for name, parameter in deltas.named_parameters():
        if parameter in bases:
            same = (key for key, one in where.items() if bases[deltas.get_parameter(key)] is bases[parameter])
            where[name] = next(same, name)
            tensors[where[name]] = bases[deltas.get_parameter(where[name])].cpu()
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    save_file(tensors, beside, {"where": json.dumps(where)})
    beside.replace(file)


def kept_bases(file: Path, deltas: Deltas) -> dict[nn.Parameter, Tensor]:
    """Read what :func:`keep_bases` wrote."""
    with safe_open(file, "pt") as stored:
        where = json.loads(stored.metadata()["where"])
    tensors = load_file(file)
    return {deltas.get_parameter(name): tensors[key] for name, key in where.items()}


def _spread(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Return some lessons, evenly spread over each kind."""
    chosen: list[Lesson] = []
    for kind in ("refuse", "answer"):
        own = [lesson for lesson in lessons if lesson.kind == kind]
        wanted = min(len(own), LESSONS // 2)
        chosen += [own[place * len(own) // wanted] for place in range(wanted)]
    return chosen


def _base(sum_DD: Tensor) -> Tensor:
    variance_D, direction_DD = torch.linalg.eigh(sum_DD)
    share_D = variance_D / variance_D.mean()
    scale_D = torch.where(share_D > _LEAST, share_D.rsqrt(), 0.0)
    base_DD: Tensor = direction_DD * scale_D
    # In one piece, as processes exchange it.
    return base_DD.float().contiguous()
