"""The monitor: a guard in front of a transformers model's own ``generate``.

    with Monitor.from_pretrained("guard/").attach(model) as monitor:
        output = model.generate(**inputs)
        for case in monitor.cases:
            print(case.verdicts, case.decision.action)

While it is attached, ``model.generate`` is wrapped on the instance, and hooks read the guard's sites and patch or steer
single requests; ``detach`` takes all of it away. Forward passes outside ``generate`` and ``generate_batch`` are neither
judged nor changed.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from spider_sense.attach import Attachment
from spider_sense.audit import AuditLog
from spider_sense.case import Case
from spider_sense.config import load_yaml
from spider_sense.continuous import ContinuousCalls, check_policy
from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.extraction.watch import Watch
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.forward import Forward, read_forward
from spider_sense.generate_arguments import GenerateArguments, read_arguments
from spider_sense.generation import GuardedCall
from spider_sense.guard import Guard
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
        self._attachment: Attachment | None = None
        self._call: GuardedCall | None = None
        self._busy = threading.Lock()
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
            ConfigError: if the monitor is attached already, or no tokenizer is found.
        """
        if self._attachment is not None:
            raise ConfigError("this monitor is attached already; detach it first, or use one monitor per model")
        model = getattr(model, "_orig_mod", model)
        if getattr(vars(model).get("generate"), "__func__", None) is Monitor._guarded_generate:
            raise ConfigError("another monitor is attached to this model; detach it first, or put both guards in one")
        tokenizer = tokenizer or _find_tokenizer(model)
        loaded = LoadedModel(model=model, tokenizer=tokenizer, source=str(model.name_or_path))
        self._serving = serving_config(model)
        self.guard.check_model(fingerprint(loaded), self._serving, allow_uncertified)
        self._judge = Judge(
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
        self._model, self._tokenizer = model, tokenizer
        patch = None if self._patch is None else LivePatch(loaded, self._patch, _alpha(self.policy))
        self._acts = Interventions(self.policy, self.guard, model.device, patch)
        self._continuous = ContinuousCalls(
            self._judge, self._acts.act, self._text, self._check_continuous, self._principal
        )
        bank = self._judge.bank
        readers = {site: bank.tap(site) for site in bank.sites}
        self._attachment = Attachment(
            model,
            readers,
            self._begin,
            self._end,
            self._acts.writers(),
            self._acts.patchers(),
            self._acts.end,
        )
        self._attachment.forward_rows = self._name_rows
        self._own_generate = vars(model).get("generate")
        self._generate = model.generate
        model.generate = self._guarded_generate
        self._own_batching = vars(model).get("init_continuous_batching")
        self._batching = model.init_continuous_batching
        model.init_continuous_batching = self._checked_batching
        return self

    def detach(self) -> None:
        """Leave the model as it was; calling it twice is harmless."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
            del self._model.generate
            if self._own_generate is not None:
                self._model.generate = self._own_generate
            del self._model.init_continuous_batching
            if self._own_batching is not None:
                self._model.init_continuous_batching = self._own_batching
            self._continuous.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def continuous(self) -> dict[str, Case]:
        """Requests of continuous batching by their id, running and ended."""
        return self._continuous.cases

    def close_ended(self) -> None:
        """Close the requests of continuous batching that the engine has ended.

        The next step does it as well; an engine that may stay idle calls this between its steps, in their thread.
        """
        self._continuous.sweep()

    def _name_rows(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Forward:
        return self._call.name_rows(args, kwargs) if self._call else read_forward(args, kwargs)

    def _begin(self, forward: Forward) -> None:
        self._forward = forward
        self._packed = any(item.prompt is not None for item in forward.sequences)
        self._judge.bank.begin(forward.total)
        if self._packed and self._call is None:
            self._continuous.begin(forward.sequences)
        self._acts.begin(forward, self._call.cache if self._call else None)

    def _end(self) -> bool:
        self._acts.end()
        forward = self._forward
        if self._packed and self._call is not None:
            # The two share the buffer of the step, so neither would know whose scores it holds.
            raise SpiderSenseError("generate and continuous batching ran at once on a guarded model; use one at a time")
        if self._packed:
            self._continuous.scored(self._judge.bank.logits(forward.total), forward.sequences)
        elif self._call is not None:
            return self._call.scored(self._judge.bank.logits(forward.total))
        return False

    def _guarded_generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self._busy.acquire(blocking=False):
            raise ConfigError("a guarded generate is running on this model; wait for it, or use continuous batching")
        try:
            return self._judged_generate(args, kwargs)
        finally:
            self._busy.release()

    def _judged_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_unchanged()
        asked_for = read_arguments(args, kwargs, self._model.generation_config)
        if self.policy.reads_again:
            asked_for.check_one_pass()
        others, end_id = dict(asked_for.others), self._end_id(asked_for.eos_ids)
        cases = self._open_cases(asked_for, others.pop("principals", None), others.pop("request_id", None))
        call = GuardedCall(
            self._judge,
            cases,
            np.repeat(asked_for.mask_BP, asked_for.copies, 0),
            asked_for.eos_ids,
            self._tokenizer(self.policy.refusal, add_special_tokens=False)["input_ids"],
            self._tokenizer("\n\n", add_special_tokens=False)["input_ids"],
            end_id,
            self._acts.act,
            self._on_step,
            asked_for.assisted,
        )
        processors = [*(others.pop("logits_processor", None) or []), call]
        self.cases, self._call = call.cases, call
        try:
            output = self._generate(asked_for.ids_BP, **others, logits_processor=LogitsProcessorList(processors))
            call.finish((output if isinstance(output, Tensor) else output.sequences).shape[1])
        finally:
            self._call = None
            self._acts.act({})
            # A pass that raised has left its rows switched on.
            self._acts.end()
            call.close()
        return output

    def _checked_batching(self, *args: Any, **kwargs: Any) -> Any:
        # What is raised in the engine's thread would stand in the outputs of requests.
        self._check_continuous()
        return self._batching(*args, **kwargs)

    def _check_continuous(self) -> None:
        check_policy(self.policy)
        if self._watch is not None:
            raise ConfigError(
                "continuous batching does not say who sends a request, so extraction cannot be watched for; use "
                "generate with principals, serve with vLLM, or attach without extraction"
            )
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Check that the model is run as it was when the guard was put in front of it."""
        serving = serving_config(self._model)
        if serving != self._serving:
            raise MismatchError(
                f"the model is served as {serving.model_dump_json()}, and was as {self._serving.model_dump_json()} "
                "when the monitor was attached; detach it and attach it again"
            )
        self._acts.check_weights(self._model)

    def _open_cases(
        self, asked_for: GenerateArguments, principals: Sequence[str | None] | None, name: str | None
    ) -> list[Case]:
        ids_BP, mask_BP, copies = asked_for.ids_BP, asked_for.mask_BP, asked_for.copies
        principals = principals or [None] * len(ids_BP)
        if len(principals) != len(ids_BP):
            raise ConfigError(f"{len(principals)} principals for {len(ids_BP)} prompts; give one for each")
        cases: list[Case] = []
        many = name is None or len(ids_BP) * copies > 1
        name = name or uuid4().hex[:12]
        with ExitStack() as undo:
            for index, principal in enumerate(principals):
                prompt = ids_BP[index][torch.from_numpy(mask_BP[index])].tolist()
                text = self._text(prompt)
                for copy in range(copies):
                    row = index * copies + copy
                    # Copies of a prompt are one question, and each is judged.
                    told = None if copy else asked_for.asked
                    cases.append(self._judge.open(f"{name}-{row}" if many else name, prompt, principal, text, told))
                    undo.callback(self._judge.scorer.close, cases[-1].request)
            undo.pop_all()
        return cases

    def _text(self, prompt: Sequence[int]) -> str | None:
        """Return a prompt as text if the audit log was asked to keep it."""
        if self._audit is None or not self._audit.include_text:
            return None
        return str(self._tokenizer.decode(prompt))

    def _end_id(self, eos_ids: Sequence[int]) -> int:
        """Return the token that is to follow a refusal."""
        end_id = eos_ids[0] if eos_ids else self._tokenizer.eos_token_id
        if end_id is None:
            raise ConfigError(
                "the model has no end token, so a request cannot be stopped; pass eos_token_id to generate"
            )
        return int(end_id)


def _check_policy(policy: Policy, guard: Guard) -> None:
    names = [detector.name for detector in guard.manifest.detectors]
    policy.check_engine("the transformers engine", SUPPORTED, names)
    choose_vector(policy, guard)


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
