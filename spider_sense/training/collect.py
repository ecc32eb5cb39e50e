"""Capture the activations of many conversations, once, so that training need not run the model again.

Shape letters: B conversations of a batch, n stored tokens of one, P sites, D width.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.capture import Capture, CapturedSequence
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.greedy import GREEDY
from spider_sense.models import LoadedModel
from spider_sense.scoring.bank import EPS
from spider_sense.sites import resolve_all, shortened
from spider_sense.training.conversations import Conversation, batches, conversation, padded
from spider_sense.training.manifest import Pins, resume
from spider_sense.training.shards import CapturedRows, append, load, responses
from spider_sense.types import Site

__all__ = ["collect", "load"]

SHARD_BYTES = 64 * 2**20


def collect(
    loaded: LoadedModel,
    examples: Sequence[Example],
    sites: Sequence[Site],
    folder: Path,
    *,
    respond: Mapping[str, int] | int = 0,
    max_tokens: int = 512,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> ActivationSet:
    """Capture the activations of examples into a folder, and load them.

    A run that was stopped goes on where it was; it loses one shard at most. What was captured from the same tokens of
    the same model is taken as it is; shards with anything else in them are made anew. ``responses.jsonl`` in the folder
    gets the responses that were generated, as ``{"id", "ids", "text"}``.

    Args:
        loaded: the model and its tokenizer.
        examples: each with an id of its own; the set has their order.
        sites: where to read; all of one width.
        folder: for the shards.
        respond: tokens of response to capture after the prompt: for every example, or by id and none for others.
            An example's own response is used up to that many tokens; else one is generated greedily. The end of
            sequence is no part of it, and the last token of a response that was cut off while it was generated has no
            row.
        max_tokens: a longer prompt loses tokens from its middle.
        batch_tokens: padded tokens of a forward pass.
        progress: gets a bar that counts tokens.

    Raises:
        ConfigError: if the sites differ in width, or ``max_tokens`` is too small for the chat template.
        DataError: if there is no example, an id is repeated, an activation is not finite, or a file is damaged.
        SiteError: if the model has no such site.
    """
    chat = Chat(loaded.tokenizer)
    _check(loaded, examples, sites, chat, max_tokens)
    tokens = dict.fromkeys((example.id for example in examples), respond) if isinstance(respond, int) else respond
    conversations = [conversation(chat, example, tokens.get(example.id, 0), max_tokens) for example in examples]
    keys = {item.id: item.key(_ends(loaded.model)) for item in conversations}
    manifest = resume(folder, _pins(loaded, sites, chat), keys)
    missing = [item for item in conversations if item.id not in manifest.done]
    advance = _bar(progress, conversations, missing)
    if missing:
        with Capture(loaded.model, sites) as capture:
            captured = _captured(loaded, sites, capture, batches(missing, batch_tokens), keys, advance)
            for rows in _shards(captured):
                manifest = append(folder, manifest, rows)
    result = load(folder)
    _write_responses(folder, loaded.tokenizer, [item.id for item in conversations if item.generate])
    return result


def _check(
    loaded: LoadedModel, examples: Sequence[Example], sites: Sequence[Site], chat: Chat, max_tokens: int
) -> None:
    widths = {str(place.site): place.width for place in resolve_all(loaded.model, sites)}
    if len(set(widths.values())) != 1:
        raise ConfigError(f"the sites have widths {widths}; name at least one site, all of them of one width")
    least = 2 * (max(len(chat.head), chat.tail) + 1)
    if max_tokens < least:
        raise ConfigError(f"max_tokens is {max_tokens}, and the chat template alone needs {least}; allow more")
    sources: dict[str, str] = {}
    for example in examples:
        if example.id in sources:
            raise DataError(
                f"the id {example.id!r} of {example.source} is already in {sources[example.id]}; give each row its own"
            )
        sources[example.id] = example.source
    if not sources:
        raise DataError("there is no example to capture; name a prompt set that has rows")


def _pins(loaded: LoadedModel, sites: Sequence[Site], chat: Chat) -> Pins:
    found = fingerprint(loaded)
    return Pins(
        weight_digest=found.weight_digest,
        tokenizer_digest=found.tokenizer_digest,
        serving=serving_config(loaded.model),
        sites=tuple(str(site) for site in sites),
        tail=chat.tail,
    )


def _bar(
    progress: Progress | None, conversations: Sequence[Conversation], missing: Sequence[Conversation]
) -> Callable[[int], None]:
    if progress is None:
        return lambda tokens: None
    total = sum(item.tokens for item in conversations)
    task = progress.add_task("Capturing tokens", total=total, completed=total - sum(item.tokens for item in missing))
    return lambda tokens: progress.advance(task, tokens)


def _shards(captured: Iterable[CapturedRows]) -> Iterator[list[CapturedRows]]:
    shard: list[CapturedRows] = []
    size = 0
    for rows in captured:
        shard.append(rows)
        size += rows.hidden.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _captured(
    loaded: LoadedModel,
    sites: Sequence[Site],
    capture: Capture,
    batched: Iterable[Sequence[Conversation]],
    keys: Mapping[str, str],
    advance: Callable[[int], None],
) -> Iterator[CapturedRows]:
    depth = 1 + max(site.layer for site in sites)
    for batch in batched:
        generated = _run(loaded, batch, depth)
        taken = {sequence.key: sequence for sequence in capture.take()}
        for index, (item, response) in enumerate(zip(batch, generated, strict=True)):
            rows = slice(item.skip, len(item.ids) + len(response))
            yield CapturedRows(
                id=item.id,
                key=keys[item.id],
                hidden=_normalised(taken[index], sites, rows, item.id),
                prompt_rows=item.prompt - item.skip,
                skip=item.skip,
                response=response,
            )
        advance(sum(item.tokens for item in batch))


@torch.inference_mode()
def _run(loaded: LoadedModel, batch: Sequence[Conversation], depth: int) -> list[tuple[int, ...]]:
    """Run the model on a batch and return what it generated of each conversation.

    Where nothing is generated, what comes after the first ``depth`` blocks is read by nobody and left out.
    """
    model: Any = loaded.model
    pad, generate = loaded.tokenizer.pad_token_id, batch[0].generate
    ids_BT, mask_BT = (x.to(model.device) for x in padded(batch, pad, left=generate > 0))
    if not generate:
        with shortened(model, depth):
            model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
        return [()] * len(batch)
    all_BT = model.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=generate,
        pad_token_id=pad,
        **GREEDY,
    )
    ends = _ends(model)
    return [_until(tokens, ends) for tokens in all_BT[:, ids_BT.shape[1] :].tolist()]


def _ends(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def _until(tokens: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def _normalised(sequence: CapturedSequence, sites: Sequence[Site], rows: slice, name: str) -> Tensor:
    hidden_nPD = torch.stack([sequence.hidden[site][rows] for site in sites], 1).float()
    if not bool(hidden_nPD.isfinite().all()):
        raise DataError(f"an activation of example {name!r} is not finite; load the model as bfloat16 or float32")
    return (hidden_nPD * torch.rsqrt(hidden_nPD.square().mean(-1, keepdim=True) + EPS)).half().cpu()


def _write_responses(folder: Path, tokenizer: Any, names: Sequence[str]) -> None:
    ids = responses(folder) if names else {}
    beside = folder / "responses.jsonl.tmp"
    with beside.open("w", encoding="utf-8") as stream:
        for name in names:
            row = {"id": name, "ids": ids[name], "text": tokenizer.decode(ids[name])}
            stream.write(json.dumps(row) + "\n")
    os.replace(beside, folder / "responses.jsonl")
