"""Compile many specialisations in several processes."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from sense_kernels.aot.specialise import Compiled, Specialisation, compile_specialisation

__all__ = ["Job", "compile_all"]

Job = tuple[Specialisation, str]
"""What to compile, and for which target."""

_REPORT_EVERY = 20


def compile_all(jobs: Sequence[Job], workers: int) -> dict[Job, Compiled | str]:
    """Compile every different job once, with progress on stderr.

    Returns:
        What came out of each, or the compiler's message where nothing did.
    """
    # The longest specialisations have the most groups of lanes to unroll: they go first, so that none is left for last.
    different = sorted(set(jobs), key=lambda job: len(job[0].data), reverse=True)
    compiled = {}
    for done, (job, result) in enumerate(_results(different, workers), 1):
        compiled[job] = result
        if done % _REPORT_EVERY == 0 or done == len(different):
            sys.stderr.write(f"compiled {done} of {len(different)}\n")
    return compiled


def _results(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Compiled | str]]:
    if workers <= 1:
        yield from ((job, _compile(job)) for job in jobs)
        return
    # Not forked: the compiler and torch have threads here.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_compile, job): job for job in jobs}
        for done in as_completed(pending):
            yield pending[done], done.result()


def _compile(job: Job) -> Compiled | str:
    specialisation, target = job
    try:
        return compile_specialisation(specialisation, target)
    except Exception as error:  # whatever a compiler raises is that row's failure, and the others go on
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
