"""What is minimised, as sums over tokens: passes of any size through the model add up to one step.

Shape letters: B lessons of a pass, A columns of answers, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nest.forward import answer_logits
from nest.full import Change
from nest.lessons import Batch, Lesson
from nest.reference import Reference, divergence

__all__ = ["Objective", "token_counts"]


class Objective(nn.Module):
    """Model and change as one module, so that accelerate synchronises the change's gradients.

    Args:
        model: a transformers causal language model.
        change: what is trained; its hooks are on while this is called.
        references: base distributions by place in the list of lessons; without any the divergence is 0.
        share_head: see :func:`nest.forward.answer_logits`.
    """

    def __init__(
        self, model: nn.Module, change: Change, references: dict[int, Reference], share_head: bool = True
    ) -> None:
        super().__init__()
        self.model, self.change = model, change
        self._references, self._share_head = references, share_head

    def forward(self, batch: Batch) -> Tensor:
        """Return the sums of refusals' loss, answers' loss and KL(base || model) over the batch's tokens, [3], nats."""
        logits_BAV = answer_logits(self.model, batch, self._share_head)
        log_BAV = logits_BAV.float().log_softmax(-1)
        picked_BA = log_BAV.gather(-1, batch.target_BA.clamp(min=0)[..., None])[..., 0]
        nats_B = (-picked_BA * (batch.target_BA >= 0)).sum(1)
        refuse, answer = (nats_B * batch.refuse_B).sum(), (nats_B * ~batch.refuse_B).sum()
        return torch.stack((refuse, answer, divergence(log_BAV, batch, self._references)))


def token_counts(lessons: Sequence[Lesson], chosen: Sequence[int], references: Mapping[int, Reference]) -> list[int]:
    """Return how many tokens each of the three sums goes over, for the lessons at some places; at least 1."""
    refuse = sum(len(lessons[place].answer) for place in chosen if lessons[place].kind == "refuse")
    answer = sum(len(lessons[place].answer) for place in chosen if lessons[place].kind == "answer")
    kl = sum(len(references[place].rest_A) for place in chosen if place in references)
    return [max(1, count) for count in (refuse, answer, kl)]
