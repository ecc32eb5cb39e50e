"""What the MLP projections say about a prompt: one number a row, the largest over the prompt's tokens.

Pooling happens inside the hook, so that no activation outlives its layer.

Shape letters: N prompts, B prompts of a batch, T padded tokens, F rows of a projection.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nest.expert_activations import attached, reached
from spider_sense.attach import Attachment, Reader
from spider_sense.chat import Chat, Rendered
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError
from spider_sense.experts import experts_of, resolve_expert
from spider_sense.layouts import layout_of
from spider_sense.models import LoadedModel
from spider_sense.sites import layer_count, resolve
from spider_sense.types import Site

__all__ = ["Pool", "masked_max", "pooled_activations", "projection_sites"]

Pool = Literal["max", "raw"]
"""``max`` is over the tokens that are scored: neither padding nor the constant head of the chat template. ``raw`` is
over all columns of a left-padded batch, padding and attention sink included, as in the authors' public code."""

PROJECTIONS = ("gate", "up")


def projection_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return every gate and up projection of a model, by layer, and of a mixture of experts by expert.

    Raises:
        SiteError: if the architecture is unknown.
    """
    places = [place for place in layout_of(model).projections if place in PROJECTIONS]
    sites = []
    for layer in range(layer_count(model)):
        experts = experts_of(model, layer)
        indices = [None] if experts is None else range(experts.count)
        sites += [Site(layer, place, expert) for expert in indices for place in places]
    return tuple(sites)


def masked_max(hidden_BTF: Tensor, keep_BT: Tensor) -> Tensor:
    """Return the largest value of each feature over the tokens that are kept, [B, F]; -inf where none is."""
    return hidden_BTF.masked_fill(~keep_BT[..., None], -torch.inf).amax(1)


def pooled_activations(
    loaded: LoadedModel,
    examples: Sequence[Example],
    sites: Sequence[Site],
    *,
    pool: Pool = "max",
    max_tokens: int = 512,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> dict[Site, Tensor]:
    """Run prompts through a model and pool what its projections put out, before the activation function.

    Args:
        loaded: the model and its tokenizer.
        examples: N prompts; one with several turns is read as that conversation.
        sites: where to read.
        pool: over which tokens. With ``max`` the result does not depend on the batches.
        max_tokens: a longer prompt loses tokens from its middle.
        batch_size: prompts of a forward pass.
        advance: is told how many prompts a pass took.

    Returns:
        For each site [N, F] float32 on the CPU, rows in the order of ``examples``. In an expert's, the row of a prompt
        of which no pooled token is routed to the expert is -inf (:func:`nest.expert_activations.reached`).

    Raises:
        ConfigError: if there is no chat template, or ``max_tokens`` is too small for it.
        DataError: if an activation is not finite.
        SiteError: if the model has no such site.
    """
    chat = Chat(loaded.tokenizer)
    _check_room(chat, max_tokens)
    prompts = [chat.render(example.turns or example.text, max_tokens) for example in examples]
    result = {site: torch.empty(len(prompts), _width(loaded.model, site)) for site in sites}
    pooler = _Pooler(pool)
    with ExitStack() as stack:
        pooler.attach(stack, loaded.model, sites)
        for rows in _batches(prompts, batch_size, pool):
            for site, pooled_BF in pooler.run(loaded, [prompts[row] for row in rows]).items():
                result[site][rows] = pooled_BF
            if advance is not None:
                advance(len(rows))
    _check_finite(result, examples)
    return result


class _Pooler:
    """Keeps the mask of the batch that is running and what each site's reader made of it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._keep_BT = torch.empty(0)
        self._pooled: dict[Site, Tensor] = {}

    def attach(self, stack: ExitStack, model: nn.Module, sites: Sequence[Site]) -> None:
        """Read the sites until the stack is left."""
        readers = {site: self._reader(site) for site in sites if site.expert is None}
        stack.enter_context(Attachment(model, readers, _nothing, _nothing))
        inside = [site for site in sites if site.expert is not None]
        stack.enter_context(attached(model, inside, lambda: self._keep_BT, self._pooled.update))

    def _reader(self, site: Site) -> Reader:
        def read(hidden_BTF: Tensor) -> None:
            self._pooled[site] = masked_max(hidden_BTF, self._keep_BT)

        return read

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, batch: Sequence[Rendered]) -> Mapping[Site, Tensor]:
        model: Any = loaded.model
        ids_BT, mask_BT, keep_BT = _padded(batch, loaded.tokenizer.pad_token_id, self._pool)
        self._keep_BT = keep_BT.to(model.device)
        inputs = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
        model(**inputs, use_cache=False, logits_to_keep=1)
        return {site: pooled_BF.float().cpu() for site, pooled_BF in self._pooled.items()}


def _width(model: nn.Module, site: Site) -> int:
    return resolve(model, site).width if site.expert is None else resolve_expert(model, site).width


def _padded(batch: Sequence[Rendered], pad_id: int, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and the tokens to pool over, all [B, T]."""
    longest = max(len(prompt.ids) for prompt in batch)
    ids_BT = torch.full((len(batch), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    keep_BT = torch.full_like(ids_BT, pool == "raw", dtype=torch.bool)
    for row, prompt in enumerate(batch):
        start = longest - len(prompt.ids) if pool == "raw" else 0
        stop = start + len(prompt.ids)
        ids_BT[row, start:stop] = torch.tensor(prompt.ids)
        mask_BT[row, start:stop] = 1
        keep_BT[row, start + prompt.skip : stop] = True
    return ids_BT, mask_BT, keep_BT


def _batches(prompts: Sequence[Rendered], size: int, pool: Pool) -> list[list[int]]:
    if size < 1:
        raise ConfigError(f"batch_size is {size}; choose at least 1, for example 16")
    order = list(range(len(prompts)))
    if pool == "max":
        # Longest first: memory that is too small shows itself at once.
        order.sort(key=lambda row: len(prompts[row].ids), reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _check_room(chat: Chat, max_tokens: int) -> None:
    least = 2 * (max(len(chat.head), chat.tail) + 1)
    if max_tokens < least:
        raise ConfigError(f"max_tokens is {max_tokens}, and the chat template alone needs {least}; allow more")


def _check_finite(pooled: Mapping[Site, Tensor], examples: Sequence[Example]) -> None:
    for site, pooled_NF in pooled.items():
        bad_N = (~pooled_NF.isfinite()).any(1)
        bad = (bad_N if site.expert is None else bad_N & reached(pooled_NF)).nonzero()
        if len(bad):
            name = examples[int(bad[0])].id
            raise DataError(
                f"an activation at {site} of example {name!r} is not finite; load the model as bfloat16 or float32"
            )


def _nothing(*_: object) -> None:
    """Attachments announce each pass; the pooler runs the passes itself."""
