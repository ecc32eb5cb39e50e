"""The monitor: a guard in front of a transformers model's own ``generate``.

    with Monitor.from_pretrained("guard/").attach(model) as monitor:
        output = model.generate(**inputs)
        for case in monitor.cases:
            print(case.verdicts, case.decision.action)

While it is attached, ``model.generate`` is wrapped on the instance, and hooks read the guard's sites and patch or steer
single requests; ``detach`` takes all of it away. Forward passes outside ``generate`` and ``generate_batch`` are neither
judged nor changed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from spider_sense.audit import AuditLog
from spider_sense.case import Case
from spider_sense.config import load_yaml
from spider_sense.errors import ConfigError
from spider_sense.extraction.watch import Watch
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import Guard
from spider_sense.guarded_model import GuardedModel, is_guarded
from spider_sense.interventions import Interventions, choose_patch, choose_vector
from spider_sense.judge import Judge
from spider_sense.live_patch import LivePatch
from spider_sense.lost_events import LostEvents
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch
from spider_sense.policy import Policy
from spider_sense.types import Action

__all__ = ["Monitor"]

SUPPORTED: tuple[Action, ...] = ("observe", "flag", "verify", "escalate", "patch", "steer", "stop")
"""Actions that this engine can carry out; flag, verify and escalate arrive at ``on_decision`` and in the audit log."""


class Monitor:
    """Watches a model with a guard.

    Args:
        guard: probes and thresholds.
        policy: what to do about a verdict; by default a breach is stopped and a suspect flagged.
        audit: where to record events.
        keep_history: whether cases keep the readout at every step.
        on_decision: called when a request's decision becomes stricter; this is where ``flag`` and ``escalate`` arrive.
        on_step: called after each judged step with the running cases.
        patch: what the action ``patch`` switches on, if the policy names no folder.
        extraction: watches who mines the model, by the principals that ``generate`` is handed; None for nobody.
        on_close: called when a request has ended, however it did.
        principal: says who sends a request of continuous batching, by the engine's id; None where nobody knows.
        lost: counts the events that ``audit`` does not take, whose requests are stopped; None ends the call with the
            log's error.
    """

    def __init__(
        self,
        guard: Guard,
        policy: Policy | None = None,
        audit: AuditLog | None = None,
        keep_history: bool = False,
        on_decision: Callable[[Case], None] | None = None,
        on_step: Callable[[Sequence[Case]], None] | None = None,
        patch: NeuronPatch | None = None,
        extraction: Watch | None = None,
        on_close: Callable[[Case], None] | None = None,
        principal: Callable[[str], str | None] | None = None,
        lost: LostEvents | None = None,
    ) -> None:
        self.guard, self.policy = guard, policy or Policy.default()
        self._audit, self._lost, self._keep_history = audit, lost, keep_history
        self._on_decision, self._on_step = on_decision, on_step
        self._watch, self._on_close, self._principal = extraction, on_close, principal
        self.cases: list[Case] = []
        """The requests of the last ``generate`` call, in the order of its rows."""
        self._model: GuardedModel | None = None
        """What the guard is in front of, or was until ``detach``."""
        _check_policy(self.policy, guard)
        self._patch = choose_patch(self.policy, patch)

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: Policy | str | Path | None = None, **options: Any) -> Self:
        """Read a guard folder, and a policy where a YAML file is named; further arguments are those of the class."""
        read = load_yaml(policy, Policy) if isinstance(policy, str | Path) else policy
        return cls(Guard.from_pretrained(folder), read, **options)

    def attach(self, model: Any, tokenizer: Any = None, allow_uncertified: bool = False) -> Self:
        """Put the guard in front of a model.

        Args:
            model: a transformers causal language model.
            tokenizer: its tokenizer; if None, it is loaded from where the model came from.
            allow_uncertified: accept a dtype, quantisation or adapter that the thresholds were not calibrated for.

        Raises:
            MismatchError: if the guard was made for another model, tokenizer or serving configuration, or the patch for
                another model; a patch needs plain weights, whatever ``allow_uncertified`` says.
            PatchError: if the patch does not fit, or the weights are quantised or patched already.
            SiteError: if the model lacks a site of the guard.
            ConfigError: if the monitor is attached already, no tokenizer is found, or the model is on several devices.
        """
        if self._model is not None and self._model.attached:
            raise ConfigError("this monitor is attached already; detach it first, or use one monitor per model")
        model = getattr(model, "_orig_mod", model)
        if is_guarded(model):
            raise ConfigError("another monitor is attached to this model; detach it first, or put both guards in one")
        _check_device(model)
        tokenizer = tokenizer or _find_tokenizer(model)
        loaded = LoadedModel(model=model, tokenizer=tokenizer, source=str(model.name_or_path))
        self.guard.check_model(fingerprint(loaded), serving_config(model), allow_uncertified)
        judge = self._make_judge(model)
        patch = None if self._patch is None else LivePatch(loaded, self._patch, _alpha(self.policy))
        acts = Interventions(self.policy, self.guard, model.device, patch)
        self._model = GuardedModel(loaded, judge, acts, self._begin, self._on_step, self._principal)
        return self

    def _make_judge(self, model: Any) -> Judge:
        return Judge(
            self.guard,
            self.policy,
            self._audit,
            model.device,
            self._keep_history,
            self._on_decision,
            model.dtype,
            watch=self._watch,
            on_close=self._on_close,
            lost=self._lost,
        )

    def _begin(self, cases: list[Case]) -> None:
        self.cases = cases

    def detach(self) -> None:
        """Leave the model as it was; calling it twice is harmless."""
        if self._model is not None:
            self._model.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def continuous(self) -> dict[str, Case]:
        """Requests of continuous batching by their id, running and ended; after ``detach``, those that were.

        Raises:
            ConfigError: if the monitor was never attached.
        """
        return self._guarded.continuous.cases

    def close_ended(self) -> None:
        """Close the requests of continuous batching that the engine has ended.

        The next step does it as well; an engine that may stay idle calls this between its steps, in their thread.

        Raises:
            ConfigError: if the monitor was never attached.
        """
        self._guarded.continuous.sweep()

    @property
    def _guarded(self) -> GuardedModel:
        if self._model is None:
            raise ConfigError("this monitor was never attached, so it knows of no requests; call attach(model) first")
        return self._model


def _check_policy(policy: Policy, guard: Guard) -> None:
    names = [detector.name for detector in guard.manifest.detectors]
    policy.check_engine("the transformers engine", SUPPORTED, names)
    choose_vector(policy, guard)


def _check_device(model: Any) -> None:
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1:
        raise ConfigError(
            f"the model lies on {', '.join(devices)}, and a guard scores on one device; load it onto one, for example "
            "with CUDA_VISIBLE_DEVICES=0, or serve it with vLLM and tensor parallelism"
        )


def _alpha(policy: Policy) -> float | None:
    return policy.patch.alpha if policy.patch else None


def _find_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer at {model.name_or_path!r}, where the model came from; pass attach(model, tokenizer)"
        ) from error
