"""Find the neurons that tell harmful from benign prompts: rows of gate and up projections.

After NeST (arXiv 2602.16835): the prompts are read once, each row's activation is pooled over the tokens, and
:mod:`nest.selection` keeps the rows that a linear probe leans on.

Shape letters: N prompts, R selected rows of a projection.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import Field
from rich.progress import Progress
from torch import Tensor

from nest.activations import pooled_activations, projection_sites
from nest.neurons import ModuleRecord, NeuronManifest, Neurons, NeuronSet, PromptCounts
from nest.selection import FEWEST, PooledPrompts, SelectConfig, Selection, select, standardised
from spider_sense.data import Example, digest
from spider_sense.errors import DataError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel
from spider_sense.types import Site

__all__ = ["FindConfig", "find", "neuron_set", "pool_prompts"]


class FindConfig(SelectConfig):
    """How neurons are found."""

    max_tokens: int = Field(default=512, ge=1)
    """A longer prompt loses tokens from its middle."""
    batch_size: int = Field(default=16, ge=1)


def find(
    loaded: LoadedModel,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    config: FindConfig,
    utility: Sequence[Example] | None = None,
    progress: Progress | None = None,
) -> NeuronSet:
    """Find the neurons of a model.

    Args:
        loaded: the model and its tokenizer.
        harmful: prompts whose neurons are looked for.
        benign: prompts to tell them from; on the same topics, or topics are what is found.
        config: the recipe.
        utility: if given, rows that the same recipe selects for these prompts against ``benign`` are dropped, after the
            set difference of Wei et al. (arXiv 2402.05162).
        progress: gets bars for the prompts and the projections.

    Returns:
        The neurons, with profiles on the harmful and then the benign prompts.

    Raises:
        ConfigError: if there is no chat template, or ``max_tokens`` is too small for it.
        DataError: if there are too few prompts, also for every expert of a mixture, or no row is selected.
        MissingExtraError: for the recipe ``probe`` without scikit-learn.
        SiteError: if the architecture is not supported.
    """
    _check_counts(harmful=harmful, benign=benign, utility=utility)
    prompts = pool_prompts(loaded, harmful, benign, config, progress)
    selected = select(prompts, config, progress)
    if utility is not None:
        spared = select(pool_prompts(loaded, utility, benign, config, progress), config, progress)
        selected = {
            site: selection.less(spared[site].neuron_R) if site in spared else selection
            for site, selection in selected.items()
        }
    return neuron_set(loaded, prompts, selected, config, utility)


def pool_prompts(
    loaded: LoadedModel,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    config: FindConfig,
    progress: Progress | None = None,
) -> PooledPrompts:
    """Run both classes through the model, pooled as the recipe asks; see :func:`find`."""
    chosen, examples = config.chosen(), (*harmful, *benign)
    sites = projection_sites(loaded.model)
    task = None if progress is None else progress.add_task("Reading prompts", total=len(examples))
    pooled = pooled_activations(
        loaded,
        examples,
        sites,
        pool=chosen.pool,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        advance=None if progress is None or task is None else lambda count: progress.advance(task, count),
    )
    return PooledPrompts(examples, np.arange(len(examples)) < len(harmful), pooled)


def neuron_set(
    loaded: LoadedModel,
    prompts: PooledPrompts,
    selected: Mapping[Site, Selection],
    config: FindConfig,
    utility: Sequence[Example] | None = None,
) -> NeuronSet:
    """Make a set of neurons of what was selected.

    Args:
        loaded: the model that the prompts were read with.
        prompts: what was selected from.
        selected: for every projection that was looked at; the others are recorded as left out.
        config: the recipe, for the manifest.
        utility: prompts whose rows were dropped, for the manifest.

    Raises:
        DataError: if no row is selected.
    """
    if not any(len(selection.neuron_R) for selection in selected.values()):
        raise DataError(f"no row is left with a z-score above {config.z:g}; choose a smaller z, or another recipe")
    positives = int(prompts.label_N.sum())
    manifest = NeuronManifest(
        base=fingerprint(loaded),
        recipe=config.model_dump() | {"minus_utility": utility is not None},
        modules={str(site): _record(prompts.pooled[site], selection) for site, selection in selected.items()},
        left_out={str(site): prompts.reach(site) for site in prompts.pooled if site not in selected},
        prompts=PromptCounts(
            harmful=positives,
            benign=len(prompts.examples) - positives,
            utility=len(utility or ()),
            digest=digest([*prompts.examples, *(utility or ())]),
        ),
    )
    sites = {
        site: Neurons(selection.neuron_R, selection.score_R, _profiles(prompts, site, selection.neuron_R))
        for site, selection in selected.items()
        if len(selection.neuron_R)
    }
    return NeuronSet(manifest, sites)


def _record(pooled_NF: Tensor, selection: Selection) -> ModuleRecord:
    return ModuleRecord(
        rows=pooled_NF.shape[1], selected=len(selection.neuron_R), held_out_auroc=selection.held_out_auroc
    )


def _profiles(prompts: PooledPrompts, site: Site, neuron_R: Tensor) -> Tensor:
    """Return the rows' activations [R, N], standardised over the prompts that have one; 0, the mean, elsewhere."""
    on_N = torch.from_numpy(prompts.reaching(site))
    profile_RN = torch.zeros(len(neuron_R), len(on_N))
    profile_RN[:, on_N] = torch.from_numpy(standardised(prompts.pooled[site][on_N][:, neuron_R].numpy()).T)
    return profile_RN


def _check_counts(**prompts: Sequence[Example] | None) -> None:
    for name, examples in prompts.items():
        if examples is not None and len(examples) < FEWEST:
            raise DataError(
                f"{len(examples)} {name} prompts are too few to find neurons; give at least {FEWEST}, better 300"
            )
