"""Greedy answers of a model to prompts, as a server would give them.

Whether an answer refuses shows in its opening, so evaluation asks for few tokens: 12 to 24 hold every opening that
:mod:`nest.refusal` looks for.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nest.greedy import end_tokens, greedy, left_padded
from spider_sense.chat import Chat, Turn
from spider_sense.errors import ConfigError
from spider_sense.models import LoadedModel

__all__ = ["generate_answers"]

_CPU_TOKENS = 2048
"""Of prompts in a batch on a processor: the activations of more leave its caches, and each token takes longer."""


def generate_answers(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[Turn]],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    prefix: str = "",
    max_prompt_tokens: int = 512,
    through_generate: bool = False,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer each prompt greedily.

    Prompts are sorted by length, so that batches hold little padding, and padded on the left.

    Args:
        loaded: the model and its tokenizer.
        prompts: texts of a user's turn, or whole conversations.
        max_new_tokens: most tokens of an answer.
        batch_size: most prompts in a batch; on a processor long ones come in smaller batches.
        prefix: what the model is made to begin with (the prefill attack); it is not part of the returned text.
        max_prompt_tokens: a longer prompt is cut in the middle.
        through_generate: call ``model.generate``, which an attached guard needs, instead of this project's own loop,
            which computes the chat template's opening once a batch and drops answers that ended.
        advance: called with the number of prompts done.

    Returns:
        The answers in the order of the prompts, without special tokens.

    Raises:
        ConfigError: if there is no chat template, or a number is not positive.
    """
    for name, number in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}; it must be at least 1")
    chat, tokenizer = Chat(loaded.tokenizer), loaded.tokenizer
    begin = tuple(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else ()
    rows = [chat.render(prompt, max_prompt_tokens).ids + begin for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    answers = [""] * len(rows)
    run = _generate if through_generate else _own
    budget = _CPU_TOKENS if loaded.model.device.type == "cpu" else None
    for chosen in _batches(order, rows, batch_size, budget):
        for place, tokens in zip(chosen, run(loaded, [rows[i] for i in chosen], max_new_tokens), strict=True):
            answers[place] = tokenizer.decode(tokens, skip_special_tokens=True)
        if advance is not None:
            advance(len(chosen))
    return answers


def _batches(order: Sequence[int], rows: Sequence[Sequence[int]], size: int, budget: int | None) -> Iterator[list[int]]:
    """Split places of rows, the shortest first, so that no batch but one of a single row holds more than its budget."""
    batch: list[int] = []
    for place in order:
        full = budget is not None and (len(batch) + 1) * len(rows[place]) > budget
        if batch and (full or len(batch) == size):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _own(loaded: LoadedModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    ends = end_tokens(loaded.model, loaded.tokenizer)
    return greedy(loaded.model, rows, max_new_tokens, ends, _pad(loaded))


@torch.inference_mode()
def _generate(loaded: LoadedModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    model: Any = loaded.model
    input_BP, mask_BP, _ = left_padded(rows, _pad(loaded), model.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": _pad(loaded)}
    output_BX = model.generate(input_BP, attention_mask=mask_BP, **options)
    ends, answers = end_tokens(model, loaded.tokenizer), output_BX[:, input_BP.shape[1] :].tolist()
    return [answer[: next((at for at, token in enumerate(answer) if token in ends), len(answer))] for answer in answers]


def _pad(loaded: LoadedModel) -> int:
    pad = loaded.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)
