"""The runs of a comparison shared out over processes, on one GPU or on the cores of a processor.

A step of a small model keeps a GPU waiting for the processor that launches its kernels; other processes fill the gaps.
"""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from rich.progress import Progress

from nest.bench.config import BenchConfig
from nest.bench.measure import Bench
from nest.bench.plan import Run, plan
from nest.bench.run import Compared, Finished, collect, run_base, run_one
from nest.bench.stage import set_stage
from nest.bench.train import choose_rate

__all__ = ["run_processes"]

_mine: dict[str, Bench] = {}
"""What this process measures with, once it is set up."""


def run_processes(config: BenchConfig, progress: Progress, device: str, processes: int) -> Compared:
    """Train and measure every arm, several runs at a time; each process holds the model.

    Args:
        config: the comparison.
        progress: gets a bar of runs.
        device: cpu, cuda, or one of several GPUs.
        processes: how many.

    Returns:
        What :func:`nest.bench.run.run_bench` returns.
    """
    set_stage(config, progress, device)  # What it leaves in the folder no process has to make again.
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), _set_up, (config, device, threads)) as pool:
        try:
            return _share_out(pool, config, progress)
        finally:
            pool.shutdown(cancel_futures=True)


def _share_out(pool: ProcessPoolExecutor, config: BenchConfig, progress: Progress) -> Compared:
    base = pool.submit(_base)
    rates = {pool.submit(_rate, arm): arm for arm in config.arms}
    bar = progress.add_task("learning rates", total=len(rates))
    runs = []
    for chosen in as_completed(rates):
        chosen.result()
        runs += [pool.submit(_run, run) for run in plan(config) if run.arm == rates[chosen]]
        progress.update(bar, advance=1)
    measured = base.result()
    bar = progress.add_task("runs", total=len(runs))
    finished: dict[Run, Finished] = {}
    for done in as_completed(runs):
        one = done.result()
        finished[one.run] = one
        progress.update(bar, advance=1, description=one.run.name)
    return collect(config, measured, [finished[run] for run in plan(config)])


def _set_up(config: BenchConfig, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    silent = Progress(disable=True)
    _mine["bench"] = Bench(config, set_stage(config, silent, device), silent)


def _base() -> dict[str, Any]:
    return run_base(_mine["bench"])


def _rate(arm: str) -> float:
    bench = _mine["bench"]
    return choose_rate(arm, bench.stage, bench.config, bench.steps)


def _run(run: Run) -> Finished:
    return run_one(_mine["bench"], run)
