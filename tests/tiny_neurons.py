"""A tiny model in which known rows answer to one word, prompts with and without the word, and sets of neurons."""

from random import Random
from typing import TYPE_CHECKING

import torch

from nest.neurons import ModuleRecord, NeuronManifest, Neurons, NeuronSet, PromptCounts
from spider_sense.data import Example
from spider_sense.fingerprint import fingerprint
from spider_sense.patching import projection_FD
from spider_sense.types import Site

if TYPE_CHECKING:
    from spider_sense.models import LoadedModel

WORD = "w9"
PLANTED = {Site(0, "gate"): [3, 17], Site(0, "up"): [8, 30]}
"""Rows that answer to the word in a model that :func:`plant` changed."""
AXIS = 5


def prompt_rows(count: int, word: str | None, seed: int, prefix: str = "row") -> list[Example]:
    """Make prompts of three to nine random words, each with the given word somewhere among them."""
    rng = Random(seed)
    texts = []
    for _ in range(count):
        words = [f"w{rng.choice([n for n in range(1, 40) if n != 9])}" for _ in range(rng.randint(3, 9))]
        if word is not None:
            words.insert(rng.randrange(len(words) + 1), word)
        texts.append(" ".join(words))
    names = [f"{prefix}-{seed}-{index}" for index in range(count)]
    return [
        Example(id=name, text=text, label="", category="", source=prefix, group=name)
        for name, text in zip(names, texts, strict=True)
    ]


@torch.no_grad()
def plant(loaded: "LoadedModel", word: str = WORD, rows: dict[Site, list[int]] = PLANTED) -> "LoadedModel":
    """Make rows of the first block answer to a word, along an axis that nothing else in the block reads or writes.

    Attention of that block is silenced, so that a token's MLP input is its own embedding.
    """
    model = loaded.model
    embedding = model.get_input_embeddings().weight
    embedding[:, AXIS] = 0
    token = loaded.tokenizer.convert_tokens_to_ids(word)
    embedding[token] = 0
    embedding[token, AXIS] = 1
    model.get_submodule("model.layers.0.self_attn.o_proj").weight.zero_()
    for site, chosen in rows.items():
        weight = projection_FD(model, site)
        weight[:, AXIS] = 0
        weight[chosen, AXIS] = 1
    return loaded


@torch.no_grad()
def plant_in_expert(loaded: "LoadedModel", expert: int, rows: list[int], word: str = WORD) -> "LoadedModel":
    """Make rows of gate and up of one expert of the first block answer to a word, which is routed there."""
    plant(loaded, word, {Site(0, place, expert): rows for place in ("gate", "up")})
    router = loaded.model.model.layers[0].mlp.gate.weight
    router[:, AXIS] = 0
    router[expert, AXIS] = 1
    return loaded


def neuron_set(loaded: "LoadedModel", profiles: dict[Site, torch.Tensor], rows: int = 48) -> NeuronSet:
    """Make a set of neurons with the first rows of each site, one for each profile."""
    sites = {
        site: Neurons(torch.arange(len(profile_RN)), torch.full((len(profile_RN),), 3.5), profile_RN)
        for site, profile_RN in profiles.items()
    }
    manifest = NeuronManifest(
        base=fingerprint(loaded),
        recipe={"recipe": "probe", "z": 3.0},
        modules={
            str(site): ModuleRecord(rows=rows, selected=len(profile_RN), held_out_auroc=0.9)
            for site, profile_RN in profiles.items()
        },
        prompts=PromptCounts(harmful=4, benign=4, digest="d"),
    )
    return NeuronSet(manifest, sites)
