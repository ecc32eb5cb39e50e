"""What is done to the hidden states of single requests: steering, and the live patch.

A request is patched (or steered) from the first pass after the decision on, and only its new tokens are: a token that
an earlier pass computed without the patch stays without it where it is computed again, as after preemption or with
``use_cache=False``. Where a verdict is read in its own step (``same_step``, and always under continuous batching), the
token that follows the judged one is the first that passes through the model under the patch. By default a verdict is
read one step later, and the patch begins one token later. ``Case.patched_from`` says which token it was.

Where the policy's ``patch.begin`` is ``prompt``, ``generate`` judges a prompt in its own step, and if it is to be
patched, reads it once more under the patch (``generation``): ``patched_from`` is 0, and all of the request is patched.

KV that was made under a patch or a steer serves no other request: caches of ``generate`` are marked, and refused later
(``kv_marks``); blocks of continuous batching are withheld from sharing. Copies of a prompt (``num_return_sequences``)
may share its KV, which is older than any verdict.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sense_kernels import steer
from spider_sense.attach import Patcher, Writer
from spider_sense.case import Case
from spider_sense.errors import ConfigError, PatchError, nearest
from spider_sense.forward import Forward, SequenceRows
from spider_sense.guard import Guard
from spider_sense.kv_marks import mark_altered
from spider_sense.live_patch import LivePatch, RowStrengths
from spider_sense.patch import NeuronPatch
from spider_sense.patching import applied_to
from spider_sense.policy import Policy
from spider_sense.types import Site

__all__ = ["Interventions", "choose_patch", "choose_vector"]


class Interventions:
    """Carries out ``patch`` and ``steer`` on the rows of the requests that they are decided for.

    Args:
        policy: says with what strength.
        guard: has the steering vectors.
        device: where the model runs.
        patch: the patch beside the model, if there is one.
    """

    def __init__(self, policy: Policy, guard: Guard, device: torch.device, patch: LivePatch | None) -> None:
        self._patch = patch
        self._steer_site, vector = choose_vector(policy, guard)
        self._vector = None if vector is None else vector.to(device)
        self._strength = RowStrengths(device)
        self._multiple = policy.steer.strength if policy.steer else 0.0
        self._acting: Mapping[Hashable, Case] = {}

    def writers(self) -> dict[Site, Writer]:
        """Return what steers."""
        vector = self._vector
        if vector is None or self._steer_site is None:
            return {}

        def write(hidden: Tensor) -> Tensor:
            # Compiled code asks the strengths on the device instead, or it would be compiled once more.
            if not torch.compiler.is_compiling() and not self._strength.used:
                return hidden
            moved: Tensor = steer(hidden, self._strength.tensor, vector)
            return moved

        return {self._steer_site: write}

    def patchers(self) -> dict[Site, Patcher]:
        """Return what patches."""
        return {} if self._patch is None else self._patch.patchers()

    def act(self, acting: Mapping[Hashable, Case]) -> None:
        """Take the cases that are patched or steered from the next pass on, by the keys of their rows."""
        self._acting = acting

    def begin(self, forward: Forward, cache: Any) -> None:
        """Set the strength of each row of the pass that is about to run.

        Args:
            forward: its rows.
            cache: the KV cache that it fills, None if it has none or the engine keeps it in blocks.
        """
        patched: list[np.ndarray] = []
        steered: list[np.ndarray] = []
        for item in forward.sequences if self._acting else ():
            case = self._acting.get(item.key)
            if case is not None:
                _start(case)
                for start, rows in ((case.patched_from, patched), (case.steered_from, steered)):
                    if start is not None:
                        rows.append(_claim(item, start, forward, cache))
        if self._patch is not None:
            self._patch.set(forward.total, _joined(patched))
        if self._vector is not None:
            self._strength.set(forward.total, _joined(steered), self._multiple)

    def check_weights(self, model: Any) -> None:
        """Check that no patch was applied to the weights since this one was put beside them.

        Raises:
            PatchError: if one was: flagged rows would get both.
        """
        applied = applied_to(model)
        if self._patch is not None and applied is not None:
            raise PatchError(
                f"patch {applied.patch.digest} was applied to the weights while patch {self._patch.patch.digest} waits "
                "beside them for single requests; revert the one, or detach the monitor"
            )

    def end(self) -> None:
        """Leave all rows alone, those of passes over parts of the model too, until the next pass begins."""
        if self._patch is not None:
            self._patch.rest()
        self._strength.rest()


def choose_patch(policy: Policy, patch: NeuronPatch | None) -> NeuronPatch | None:
    """Return the patch that a policy switches on: the one that was handed over, or the one of its folder.

    Raises:
        ConfigError: if there are two, or none and a rule says ``patch``.
        PatchError: if the folder holds no patch, or a damaged one.
    """
    section = policy.patch
    if section is None:
        return patch
    if patch is not None and section.folder is not None:
        raise ConfigError(
            f"the policy names the patch {section.folder}, and another was handed over; leave out patch.folder or the "
            "argument"
        )
    if section.folder is not None:
        return NeuronPatch.from_pretrained(section.folder)
    if patch is None:
        raise ConfigError("the policy names no patch.folder, and no patch was handed over; give one of the two")
    return patch


def choose_vector(policy: Policy, guard: Guard) -> tuple[Site | None, Tensor | None]:
    """Return where and what the policy steers with, None if it does not.

    Raises:
        ConfigError: if the guard has no such vector.
    """
    if policy.steer is None:
        return None, None
    for key, vector in guard.vectors.items():
        name, _, site = key.partition("@")
        if name == policy.steer.vector:
            return Site.parse(site), vector
    known = [key.partition("@")[0] for key in guard.vectors]
    raise ConfigError(
        f"the guard has no steering vector {policy.steer.vector!r}; {nearest(policy.steer.vector, known)}"
    )


def _start(case: Case) -> None:
    """Note where it begins: at the first token that no pass has computed yet."""
    position = case.request.position
    if case.decision.action == "patch" and case.patched_from is None:
        case.patched_from = position
    # A patch that steering comes on top of stays on.
    if case.decision.action == "steer" and case.steered_from is None:
        case.steered_from = position


def _claim(item: SequenceRows, start: int, forward: Forward, cache: Any) -> np.ndarray:
    """Return the rows of a request from a position on, and keep the KV that they make from other requests."""
    rows = item.since(start)
    if len(rows):
        if item.withhold is not None:
            item.withhold()
        if cache is not None:
            mark_altered(cache, forward.past + int(rows[0]) % forward.tokens)
    return rows


def _joined(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.empty(0, np.int64)
