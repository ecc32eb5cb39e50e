"""How far a model has moved from its base: KL(base || model) in nats per token, over fixed answers to benign prompts.

Both models read the same prompt and the same answer, the base's own greedy one as a rule; at every token of the answer
their whole next-token distributions are compared.

Shape letters: B prompts, A tokens of answers, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nest.finite import check_finite
from nest.forward import answer_logits
from nest.intervals import RESAMPLES, Estimate, ratio
from nest.lessons import Batch, collate, make_lessons
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError
from spider_sense.models import LoadedModel
from spider_sense.patching import AppliedPatch, projection_FD

__all__ = ["Divergence", "measure_divergence", "patch_off"]

Off = Callable[[], AbstractContextManager[None]]
"""Gives a block in which a model is its base again."""

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL of each answer."""

    nats: tuple[float, ...]
    """Summed over the tokens of an answer."""
    tokens: tuple[int, ...]

    def per_token(self, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
        """Return nats per token over all answers; the interval is over prompts."""
        return ratio(self.nats, self.tokens, seed, resamples)


@contextmanager
def patch_off(applied: AppliedPatch) -> Iterator[None]:
    """Take a patch out of the weights within the block, bit for bit, without checking the model again."""
    weights = {site: projection_FD(applied.model, site) for site in applied.patch.targets}
    rows = {site: applied.patch.targets[site].neuron_R.to(weight.device) for site, weight in weights.items()}
    patched = {site: weight_FD[rows[site]] for site, weight_FD in weights.items()}
    try:
        for site, weight_FD in weights.items():
            weight_FD[rows[site]] = applied.originals[site].to(weight_FD.device)
        yield
    finally:
        for site, weight_FD in weights.items():
            weight_FD[rows[site]] = patched[site]


@torch.inference_mode()
def measure_divergence(
    loaded: LoadedModel,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    base: LoadedModel | None = None,
    off: Off | None = None,
    max_answer: int = 24,
    max_prompt: int = 512,
    advance: Callable[[int], None] | None = None,
) -> Divergence:
    """Compare a model with its base.

    Args:
        loaded: the model that was changed.
        examples: N benign prompts.
        answers: N answers, the same for both models.
        base: the base model, if it is loaded beside; else ``off`` is needed.
        off: gives a block in which ``loaded`` is its base, such as ``lambda: patch_off(applied)``.
        max_answer: tokens of an answer that are compared.
        max_prompt: tokens of a prompt; a longer one is cut in the middle, as when it was answered.
        advance: called with the number of prompts done.

    Raises:
        ConfigError: unless exactly one of ``base`` and ``off`` is given.
        DataError: if the numbers differ, an answer has no token, or a model computes what is not a number.
    """
    if (base is None) == (off is None):
        raise ConfigError("divergence needs the base model or a way to switch the change off, and not both")
    if len(examples) != len(answers):
        raise DataError(f"{len(examples)} prompts and {len(answers)} answers; give each prompt its answer")
    lessons = make_lessons(Chat(loaded.tokenizer), examples, answers, "answer", max_prompt, max_answer)
    if len(lessons) != len(examples):
        raise DataError("an answer has no token; leave its prompt out")
    order = sorted(range(len(lessons)), key=lambda place: len(lessons[place].prompt))
    nats: dict[int, float] = {}
    other = loaded if base is None else base
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        batch = collate(lessons, chosen, loaded.tokenizer.pad_token_id or 0, loaded.model.device)
        with off() if off is not None else nullcontext():
            base_BAV = answer_logits(other.model, batch).float()
        nats.update(zip(chosen, _kl(base_BAV, answer_logits(loaded.model, batch).float(), batch), strict=True))
        if advance is not None:
            advance(len(chosen))
    return Divergence(tuple(nats[place] for place in range(len(order))), tuple(len(one.answer) for one in lessons))


def _kl(base_BAV: Tensor, ours_BAV: Tensor, batch: Batch) -> list[float]:
    """Return sum over tokens and vocabulary of p * (log p - log q), for each answer; never negative."""
    log_p, log_q = base_BAV.log_softmax(-1), ours_BAV.log_softmax(-1)
    kl_BA = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0)
    real_BA = (batch.target_BA != -100).to(kl_BA.device)
    kl_B = (kl_BA * real_BA).sum(1, dtype=torch.float64)
    check_finite(kl_B, "divergences")
    return kl_B.tolist()
