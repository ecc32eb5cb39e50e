"""What an arm ships: nest's patch as a folder, of any other arm the size of its trained numbers."""

from nest.bench.config import BenchConfig
from nest.bench.plan import Run
from nest.bench.stage import Stage
from nest.delta import Deltas, patch_targets
from nest.full import Change
from spider_sense.patch import KIND, NeuronPatch, PatchManifest

__all__ = ["patch_bytes", "patch_of"]


def patch_bytes(run: Run, change: Change, stage: Stage, config: BenchConfig) -> int:
    """Return the size of what has to be shipped: the patch's folder, which is written, or the numbers in float32."""
    if run.arm != "nest" or not isinstance(change, Deltas):
        return 4 * change.count()
    folder = config.output / "patches" / run.name
    patch_of(change, stage, config).save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def patch_of(deltas: Deltas, stage: Stage, config: BenchConfig) -> NeuronPatch:
    """Return trained shared vectors as a patch."""
    neurons = stage.neurons
    manifest = PatchManifest(
        schema_version=KIND.version,
        base=stage.base,
        sites=tuple(map(str, neurons.sites)),
        trained_parameters=deltas.count(),
        trained_share=deltas.count() / sum(weight.numel() for weight in stage.loaded.model.parameters()),
        recipe={"find": neurons.manifest.recipe, "tune": config.tune.model_dump()},
    )
    return NeuronPatch(manifest, patch_targets(deltas, neurons))
