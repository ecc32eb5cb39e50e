"""Canaries for a guard: everyday prompts of the shipped corpus, scored as the model at hand scores them.

Shape letters: N prompts, H heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spider_sense.canary import Canaries, Canary
from spider_sense.chat import Chat
from spider_sense.corpus import load_corpus
from spider_sense.fingerprint import serving_config
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples
from spider_sense.scoring import Probe

__all__ = ["make_canaries"]

PROMPTS = 8
TOKENS = 64
"""Longer prompts are cut in the middle."""
UNMEASURED_BAND = 0.1
"""For quantised weights, which cannot be widened: that of bfloat16 on SmolLM2 is below it."""
FLOAT32_BAND = 1e-4
"""What two engines differ by in float32 at most."""
ROUNDINGS = 10
"""How many times the rounding that is measured another engine may differ by: it rounds too, and elsewhere. Of 64 random
heads on SmolLM2 in bfloat16 none differs by more than 3.4 times in vLLM on a CPU."""


def make_canaries(loaded: LoadedModel, probes: Sequence[Probe]) -> Canaries:
    """Score a few prompts in the dtype of the model.

    In 16 bits the band of a detector is a multiple of what its scores change by if the same weights compute in float32;
    of quantised weights it is a fixed one.

    Args:
        loaded: the model, as the thresholds were calibrated.
        probes: H of them.
    """
    everyday = [row for row in load_corpus() if row.source == "corpus_everyday"]
    rows = everyday[:: len(everyday) // PROMPTS][:PROMPTS]
    peak_NH = score_examples(loaded, probes, rows, max_tokens=TOKENS).peak_NH
    bands_H = np.full(len(probes), FLOAT32_BAND)
    read_H = ~np.isneginf(peak_NH[0])  # not those that read responses alone
    if serving_config(loaded.model).quantization is not None:
        bands_H[:] = UNMEASURED_BAND
    elif loaded.model.dtype != torch.float32:
        with _computing_in_float32(loaded.model):
            exact_NH = score_examples(loaded, probes, rows, max_tokens=TOKENS, dtype=torch.float32).peak_NH
        score_NR, exact_NR = peak_NH[:, read_H], exact_NH[:, read_H]
        rounding_R = (np.abs(score_NR - exact_NR) / np.maximum(1.0, np.abs(score_NR))).max(0)
        bands_H[read_H] = np.maximum(FLOAT32_BAND, ROUNDINGS * rounding_R)
    chat = Chat(loaded.tokenizer)
    prompts = tuple(
        Canary(
            tokens=chat.render(row.text, TOKENS).ids,
            scores=tuple(score if read else None for score, read in zip(peak_H.tolist(), read_H, strict=True)),
        )
        for row, peak_H in zip(rows, peak_NH, strict=True)
    )
    return Canaries(prompts=prompts, bands=tuple(bands_H.tolist()))


@contextmanager
def _computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Widen the 16-bit weights of each module while it runs; there may be no room for a copy of all of them."""
    narrow: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def before(module: nn.Module, args: Any) -> None:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        narrow[module] = [(item, item.data) for item in own if item.is_floating_point() and item.itemsize == 2]
        for item, data in narrow[module]:
            item.data = data.float()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for item, data in narrow.pop(module):
            item.data = data

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        yield
