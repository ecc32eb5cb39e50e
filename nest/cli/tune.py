"""``nest tune``."""

import time
from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app, console
from spider_sense.cli.progress import progress_bars

__all__ = ["tune"]


@app.command(name="tune")
def tune(
    neurons: Annotated[Path, typer.Argument(help="Folder that `nest group` wrote.")],
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    harmful: Annotated[list[str], typer.Option(help="Prompts to refuse: JSONL file, or corpus; repeat it.")],
    benign: Annotated[list[str], typer.Option(help="Prompts to go on answering: the same; repeat it.")],
    out: Annotated[Path, typer.Option(help="Folder of the patch.")],
    config: Annotated[Path | None, typer.Option(help="YAML file, such as configs/nest-tune.yaml.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most prompts of a side, drawn by hash.", min=1)] = None,
    work: Annotated[Path, typer.Option(help="Folder for answers and checkpoints; a run goes on from it.")] = Path(
        "runs/nest"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Tune one shared vector for each group of neurons; the result is a patch.

    Several GPUs: accelerate launch "$(command -v nest)" tune ..., with the same arguments and --device cuda.
    """
    from nest.neurons import NeuronSet
    from nest.prompts import load_prompts
    from nest.run import tune_patch
    from nest.tune import TuneConfig, processes
    from spider_sense.config import load_yaml
    from spider_sense.folders import check_writable
    from spider_sense.models import load_model
    from spider_sense.patch import KIND

    settings = TuneConfig() if config is None else load_yaml(config, TuneConfig)
    KIND.check_replaceable(out)
    check_writable(work)
    grouped = NeuronSet.from_pretrained(neurons)
    refused = load_prompts(harmful, "harmful", limit, settings.seed).examples
    answered = load_prompts(benign, "benign", limit, settings.seed).examples
    loaded = load_model(model, dtype, device)
    started = time.monotonic()
    with progress_bars() as progress:
        patch = tune_patch(loaded, grouped, refused, answered, settings, work, progress)
    state = processes(loaded.model)
    state.destroy_process_group()  # Or gloo may abort the process that ends last.
    if not state.is_main_process:
        return
    patch = patch.save_pretrained(out)
    record = patch.manifest
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(
        f"wrote {out}: {record.trained_parameters} numbers ({record.trained_share:.3%} of the model), "
        f"{size / 1024:.0f} KiB, in {time.monotonic() - started:.0f} s",
        markup=False,
    )
    for refuse, answer, kl in record.evidence.get("last_losses", ()):
        divergence = f", KL {kl:.3f}" if settings.kl_weight else ""
        console.print(f"losses of the last step, nats a token: refusals {refuse:.2f}, answers {answer:.2f}{divergence}")
