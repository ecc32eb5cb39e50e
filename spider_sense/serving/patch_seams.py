"""Only seams: where vLLM is taken hold of for the action ``patch``, in its scheduler and in its runners.

Which requests are patched from which position on is noted on vLLM's requests. It travels with every step to every rank,
and goes into the keys of KV blocks: what is computed under a patch is never lent to a request without it. A prompt that
is to be read again is preempted, as vLLM preempts requests itself, and its first token is thrown away.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.interventions import choose_patch
from spider_sense.patch import NeuronPatch
from spider_sense.patching import scaled
from spider_sense.policy import Policy
from spider_sense.serving.block_keys import set_apart
from spider_sense.serving.packed_rows import rows_of_batch, rows_of_runner
from spider_sense.serving.row_patch import RowPatch
from spider_sense.serving.settings import PATCHED, ServingSettings
from spider_sense.serving.wrap import wrap

__all__ = [
    "check_preemption",
    "find_patch",
    "install",
    "loaded",
    "patching",
    "read_again",
    "scheduling",
    "switch_on",
]

_PATCH = "_spider_sense_patch"
"""Attribute of a runner: its :class:`RowPatch`."""
_DIGEST = "_spider_sense_patch_digest"
"""Attribute of a scheduler."""
_MARK = "_spider_sense_patched"
"""Attribute of a request: the first patched position."""


def install() -> None:
    """Take hold of vLLM's classes and functions in this process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner1

    wrap(Scheduler, "schedule", _scheduled)
    wrap(Runner1, "_prepare_inputs", _packed_by_runner_1)
    wrap(Runner2, "prepare_inputs", _packed_by_runner_2)


def find_patch(settings: ServingSettings) -> tuple[NeuronPatch, float] | None:
    """Return the patch that the policy switches on and its strength, None if it has none.

    Raises:
        ConfigError: if the policy names no folder.
        PatchError: if the folder holds no patch, or a damaged one.
    """
    policy = settings.load_policy()
    patch = choose_patch(policy, None)
    return None if patch is None or policy.patch is None else (patch, scaled(patch, policy.patch.alpha))


def loaded(worker: Any, settings: ServingSettings) -> None:
    """Put the patch beside the model that a worker has loaded, whichever rank it is."""
    found = find_patch(settings)
    if found is not None:
        model, rows = worker.model_runner.get_model(), worker.vllm_config.scheduler_config.max_num_batched_tokens
        setattr(worker.model_runner, _PATCH, RowPatch(model, *found, rows, worker.device))


@contextmanager
def patching(runner: Any, step: Any) -> Iterator[None]:
    """Patch what a runner computes within, as the step says."""
    patch: RowPatch | None = getattr(runner, _PATCH, None)
    if patch is None:
        yield
        return
    # Steps that a runner makes up to warm up say nothing, and patch nobody.
    patch.begin(getattr(step, PATCHED, {}))
    yield
    patch.rest()


def scheduling(scheduler: Any, settings: ServingSettings) -> None:
    """Let a scheduler say with each step which requests are patched, if there is a patch.

    Raises:
        ConfigError: if it makes up its steps in another way than vLLM's own.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    found = find_patch(settings)
    if found is None:
        return
    if type(scheduler).schedule is not Scheduler.schedule:
        raise ConfigError(
            f"{type(scheduler).__name__} makes up its steps by itself, so no rank would hear which requests are "
            "patched; serve with vLLM's own scheduler, or with a policy that does not patch"
        )
    setattr(scheduler, _DIGEST, found[0].digest)


def check_preemption(scheduler: Any, policy: Policy) -> None:
    """Check that a scheduler can let a request begin once more, if a policy wants that.

    Raises:
        ConfigError: if it cannot.
    """
    if policy.reads_again and "drop_stale_output" not in inspect.signature(scheduler._preempt_request).parameters:
        raise ConfigError(
            "patch.begin is 'prompt', and this vLLM cannot take a step's token back from a request; install a "
            "tested version, or set patch.begin: token"
        )


def read_again(scheduler: Any, name: str) -> bool:
    """Let a running request begin once more, patched from its first token on, if it has no token of an answer yet.

    It is for requests whose prompt has just been read, before the scheduler takes in the first token of the answer.

    Args:
        scheduler: vLLM's, before it is updated with the step.
        name: the request's id.

    Returns:
        Whether it begins once more.
    """
    request = scheduler.requests[name]
    begun = request.num_output_tokens > 0 or hasattr(request, _MARK) or request not in scheduler.running
    if begun or _reads(request):
        return False
    _mark(scheduler, request, 0)
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
    # Drafts that follow the token which is thrown away are on their way to it.
    request.is_prefill_chunk = True
    return True


def switch_on(scheduler: Any, name: str, computed: int, again: bool) -> None:
    """Patch a running request from its next step on, if it is not patched yet.

    Args:
        scheduler: vLLM's.
        name: the request's id.
        computed: its tokens that were computed; of a preempted one the scheduler has forgotten how many.
        again: whether prompts are read again, so that one which is still being read is read to its end before.
    """
    request = scheduler.requests[name]
    if hasattr(request, _MARK) or (again and _reads(request)):
        return
    _mark(scheduler, request, max(request.num_computed_tokens, computed))


def _reads(request: Any) -> bool:
    """Whether a part of its prompt has not been scheduled yet."""
    return not request.num_output_tokens and request.num_computed_tokens < request.num_prompt_tokens


def _mark(scheduler: Any, request: Any, start: int) -> None:
    setattr(request, _MARK, start)
    set_apart(request, "spider_sense_patch", start, f"{getattr(scheduler, _DIGEST)}@{start}")
    # Blocks of a prompt have their keys from the beginning.
    del request.block_hashes[start // scheduler.hash_block_size :]
    request.update_block_hashes()


def _scheduled(original: Callable[..., Any], scheduler: Any, *args: Any, **options: Any) -> Any:
    step = original(*args, **options)
    if hasattr(scheduler, _DIGEST):
        marks = {name: getattr(scheduler.requests[name], _MARK, None) for name in step.num_scheduled_tokens}
        setattr(step, PATCHED, {name: mark for name, mark in marks.items() if mark is not None})
    return step


def _packed_by_runner_1(original: Callable[..., Any], runner: Any, *args: Any, **options: Any) -> Any:
    prepared, patch = original(*args, **options), getattr(runner, _PATCH, None)
    if patch is not None:
        patch.rows(*rows_of_runner(runner))
    return prepared


def _packed_by_runner_2(original: Callable[..., Any], runner: Any, *args: Any, **options: Any) -> Any:
    batch, patch = original(*args, **options), getattr(runner, _PATCH, None)
    if patch is not None:
        patch.rows(*rows_of_batch(batch))
    return batch
