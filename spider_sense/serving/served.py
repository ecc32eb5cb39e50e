"""The guard of a server whose engine runs in its own process: what is kept of it, said of each request, and counted."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from spider_sense.audit import AuditLog
from spider_sense.canary import Drift
from spider_sense.case import Case
from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.lost_events import LostEvents
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy
from spider_sense.serving.about import about
from spider_sense.serving.canary import check_drift, report
from spider_sense.serving.findings import Note, findings_of
from spider_sense.serving.front import Front
from spider_sense.serving.settings import ServingSettings

__all__ = ["Served"]

logger = logging.getLogger(__name__)

_EXPECTED = 1 << 16
"""Requests whose senders are remembered, the latest ones."""


class Served:
    """A guard, and the one model that it is put in front of.

    Args:
        settings: what the server was told.

    Raises:
        SpiderSenseError: if guard or policy are damaged, the policy asks for what the engine cannot do, or the audit
            log cannot be opened.
    """

    def __init__(self, settings: ServingSettings) -> None:
        unheard = [name for name in ("extraction", "exempt_principals") if getattr(settings, name)]
        if unheard:
            raise ConfigError(f"{', '.join(unheard)}: transformers' server cannot do this; leave it out, or use vLLM")
        self.settings, self.policy = settings, settings.load_policy()
        guard = Guard.from_pretrained(settings.guard)
        self._detectors, self._digest = [one.name for one in guard.manifest.detectors], guard.digest
        self._senders: dict[str, str | None] = {}
        with ExitStack() as closing:
            log = None if settings.audit is None else AuditLog(settings.audit, settings.audit_text)
            if log is not None:
                closing.callback(log.close)
            self._lost = LostEvents()
            self.monitor = Monitor(
                guard, self.policy, log, on_close=self._count, principal=self._senders.get, lost=self._lost
            )
            closing.callback(self.monitor.detach)
            self.front = Front(guard, self.policy, version("spider-sense"))
            self._closing = closing.pop_all()

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Put the guard in front of a model.

        Raises:
            SpiderSenseError: if it was made for another model, or the model does not score as it was calibrated.
        """
        guard, uncertified = self.monitor.guard, self.settings.allow_uncertified
        with Monitor(guard, Policy.shadow()).attach(model, tokenizer, uncertified) as trial:
            drift = _try_canaries(trial, model)
        if drift is not None:
            check_drift(drift, guard.manifest, uncertified)
        self.monitor.attach(model, tokenizer, uncertified)
        lines = (self.policy.refusal, "\n\n")
        self._refusal, self._break = (tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines)
        versions = {name.replace("-", "_"): version(name) for name in ("spider-sense", "transformers")}
        said = about(guard, self.policy, self.settings, versions)
        self.front.said = {**said, "canaries": report(drift)}

    def expect(self, name: str, principal: str | None) -> None:
        """Remember who sends a request until the engine begins it, which it may do after its client has left."""
        self._senders[name] = principal
        if len(self._senders) > _EXPECTED:
            del self._senders[next(iter(self._senders))]

    def at_close(self, end: Callable[[], object]) -> None:
        """Let something be called before the guard is taken away."""
        self._closing.callback(end)

    def ending(self, begun: bool) -> list[int]:
        """Return the tokens that a stopped request ends with, set apart from an answer that has begun."""
        return [*(self._break if begun else ()), *self._refusal]

    def verdict(self, case: Case | None) -> dict[str, Any]:
        """Return what a client may read of a request.

        Raises:
            SpiderSenseError: if there is no case: then it was not judged, and must not be answered.
        """
        if case is None:
            raise SpiderSenseError("the engine answered a request that no guard has judged")
        return findings_of([case]).answer(0, self._detectors, self._digest, self.settings.scores)

    def close(self) -> None:
        """End the engine, take the guard away, and close the audit log; a second call does nothing."""
        self._closing.close()

    def _count(self, case: Case) -> None:
        ended = [findings_of([case]).ended(0)]
        self.front.take(Note(seconds=0.0, ended=ended, throttled=[], unrecorded=self._lost.take()))


def _try_canaries(trial: Monitor, model: Any) -> Drift | None:
    """Compare what a model makes of the guard's canaries with what the guard says; None of a guard without them."""
    canaries = trial.guard.manifest.canaries
    if canaries is None:
        logger.warning(
            "the guard has no canaries, so it cannot be told whether this model scores as it was calibrated; "
            "`spider-sense calibrate` gives it some"
        )
        return None
    peaks = []
    for canary in canaries.prompts:
        ids_1P = torch.tensor([canary.tokens], device=model.device)
        # The one token that is generated is not read.
        model.generate(ids_1P, attention_mask=torch.ones_like(ids_1P), max_new_tokens=1, do_sample=False)
        peaks.append(trial.cases[0].peak)
    return canaries.drift(np.array(peaks, dtype=np.float64), [one.name for one in trial.guard.manifest.detectors])
