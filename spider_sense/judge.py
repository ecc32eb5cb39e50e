"""The judge: from maxima over time to zones, verdicts, decisions and audit records, for many requests at once.

It knows nothing of the engine: one feeds it logits and asks what is to be done.

Shape letters: B requests, H heads, T packed rows, C logit columns.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.case import Case
from spider_sense.chat import unscored
from spider_sense.decision import Decision
from spider_sense.errors import GuardError
from spider_sense.extraction.feed_counts import FeedNote
from spider_sense.extraction.observation import Asked
from spider_sense.extraction.standing import Standing
from spider_sense.extraction.watch import Heard, Watch
from spider_sense.guard import Guard
from spider_sense.lost_events import LostEvents
from spider_sense.policy import Policy
from spider_sense.scoring import Bank, Probe, Request, RequestRows, Scorer
from spider_sense.types import UNKNOWN

__all__ = ["NOTHING", "Judge", "Reading"]

Event = Literal["open", "verdict", "action", "close"]

_BREACH = 2
NOTHING, _EXEMPT = "nothing asks for an action", "its principal is exempt: nothing is done about it"
_UNRECORDED = Decision(action="stop", verdict=None, reason="it could not be recorded: what is not recorded is stopped")


@dataclass(frozen=True, slots=True)
class Reading:
    """Scores on their way to the host."""

    cases: tuple[Case, ...]
    positions: tuple[int, ...]
    """Last token that each score includes."""
    host: Tensor
    """[1, B, H] maxima over time, or [2, B, H] with the readouts; valid after ``event``."""
    event: torch.cuda.Event | None


class Judge:
    """Scores requests with a guard and decides by a policy.

    Args:
        guard: probes and thresholds.
        policy: what to do.
        audit: where to record; None records nothing.
        device: where logits arrive.
        keep_history: whether cases keep the first detector's readout at every step.
        on_decision: called when a request's decision becomes stricter.
        dtype: of the hidden states.
        rows: most rows of a step; where a step may have more, the buffer grows.
        exempt: principals whose requests are scored and recorded, and never acted on.
        watch: looks for extraction; what it reads of a prompt is scored by the same bank, after the guard's heads.
        on_close: called when a request has ended, however it did.
        lost: counts the events that ``audit`` does not take, whose requests are stopped, those of exempt principals
            too; None lets the log's error through, to whoever feeds the judge.
    """

    def __init__(
        self,
        guard: Guard,
        policy: Policy,
        audit: AuditLog | None = None,
        device: torch.device | str = "cpu",
        keep_history: bool = False,
        on_decision: Callable[[Case], None] | None = None,
        dtype: torch.dtype = torch.float32,
        rows: int = 64,
        exempt: Collection[str] = (),
        watch: Watch | None = None,
        on_close: Callable[[Case], None] | None = None,
        lost: LostEvents | None = None,
    ) -> None:
        _check_spans(guard)
        policy.check_watched(watch is not None)
        self._watch, self._unread = watch, dict[int, Case]()
        self._audit, self._lost, self._keep_history = audit, lost, keep_history
        self._on_decision, self._on_close = on_decision, on_close
        self._exempt = frozenset(exempt)
        self.bank = Bank(self._probes(guard), device, rows, dtype)
        self._take(guard, policy)

    def exchange(self, guard: Guard, policy: Policy) -> None:
        """Judge by another guard of the same sites from now on, while no request is open.

        Raises:
            GuardError: if its probes do not fit the taps; nothing is changed then.
        """
        _check_spans(guard)
        policy.check_watched(self._watch is not None)
        try:
            self.bank.exchange(self._probes(guard))
        except ValueError as error:
            raise GuardError(f"{error}; start anew with this guard") from error
        self._take(guard, policy)

    def _probes(self, guard: Guard) -> tuple[Probe, ...]:
        return (*guard.probes, *(self._watch.probes if self._watch else ()))

    def _take(self, guard: Guard, policy: Policy) -> None:
        self.guard, self.policy, self.digest = guard, policy, guard.digest
        self._names = tuple(detector.name for detector in guard.manifest.detectors)
        self.scorer = Scorer(self.bank)

    def open(
        self,
        name: str,
        prompt: Sequence[int],
        principal: str | None = None,
        text: str | None = None,
        asked: Asked | None = None,
        canary: bool = False,
    ) -> Case:
        """Start a request.

        Args:
            name: for the audit log.
            prompt: its token ids.
            principal: whom it is attributed to.
            text: the prompt, recorded only by an audit log that was asked to.
            asked: how it was asked for; None of a request that extraction is not to hear of, such as the second answer
                to a prompt. How its principal stands holds for it all the same.
            canary: whether it is the guard's own, and no principal's.
        """
        template = self.guard.manifest.template
        request = self.scorer.open(name, len(prompt), unscored(template.head, prompt), template.tail, principal)
        heads = len(self._names)
        case = Case(
            request=request,
            thresholds=self._thresholds(len(prompt)),
            peak=np.full(heads, -np.inf, dtype=np.float32),
            zone=np.zeros(heads, dtype=np.int8),
            decision=Decision(action="observe", verdict=None, reason=_EXEMPT if principal in self._exempt else NOTHING),
            detectors=self._names,
        )
        with ExitStack() as undo:
            undo.callback(self.scorer.close, request)
            if not self._record(case, "open", text=text):
                case.decision = _UNRECORDED
                if self._on_decision is not None:
                    self._on_decision(case)
            undo.pop_all()
        if self._watch is not None and not canary:
            case.standing = self._watch.standing(principal or UNKNOWN)
            if asked is not None:
                case.prompt, case.asked = prompt, asked
                self._unread[request.slot] = case
        return case

    def step(self, logits_TC: Tensor, rows: Sequence[RequestRows]) -> None:
        """Fold a step of the engine; see :meth:`spider_sense.scoring.Scorer.step`."""
        self.scorer.step(logits_TC, rows)
        if self._unread:
            self._tell(item.request for item in rows)

    def _tell(self, requests: Iterable[Request]) -> None:
        """Tell extraction of the prompts that this step has completed."""
        watch = self._watch
        assert watch is not None
        slots = {request.slot for request in requests if request.position >= request.prompt_length}
        done = [self._unread.pop(slot) for slot in slots & self._unread.keys()]
        if done:
            readout_BH = self.scorer.stream.readout([case.request.slot for case in done])
            watch.tell([_heard(case) for case in done], readout_BH[:, len(self._names) :])

    def read(self, cases: Sequence[Case]) -> Reading:
        """Start copying the scores of some cases to the host; nothing waits for the device."""
        slots = [case.request.slot for case in cases]
        heads = len(self._names)
        scores = [self.scorer.stream.peak(slots)[:, :heads]]
        if self._keep_history:
            scores.append(self.scorer.stream.readout(slots)[:, :heads])
        host = torch.stack(scores).to("cpu", non_blocking=True)
        event = None
        if self.bank.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return Reading(tuple(cases), tuple(case.request.position - 1 for case in cases), host, event)

    def decide(self, reading: Reading) -> list[Case]:
        """Turn a reading into verdicts and decisions.

        Returns:
            The cases whose decision has become stricter.
        """
        if not reading.cases:
            return []
        if reading.event is not None:
            reading.event.synchronize()
        peak_BH, *readout_BH = reading.host.numpy()
        if readout_BH:
            for case, position, readout_H in zip(reading.cases, reading.positions, readout_BH[0], strict=True):
                case.history.append((position, float(readout_H[0])))
        thresholds_B2H = np.array([case.thresholds for case in reading.cases])
        # Written with "not below" so that NaN is a breach.
        zone_BH = (~(peak_BH < thresholds_B2H[:, 0])).astype(np.int8)
        zone_BH[~(peak_BH < thresholds_B2H[:, 1])] = _BREACH
        changed = []
        raised_B = zone_BH.any(1).tolist()
        rows = zip(reading.cases, reading.positions, peak_BH, zone_BH, raised_B, strict=True)
        for case, position, peak_H, zone_H, raised in rows:
            if case.decision.action == "stop":
                continue  # it keeps the verdict that stopped it
            case.peak, case.position = peak_H, position
            # Until its prompt is read a request is no evidence, and whoever is never heard would never be cleared.
            stands = case.standing is not None and position >= case.request.prompt_length - 1
            if stands or case.request.missing > case.missing or (raised and (zone_H > case.zone).any()):
                case.missing = case.request.missing
                case.zone = np.maximum(case.zone, zone_H)
                standing, case.standing = (case.standing, None) if stands else (None, case.standing)
                if self._decide(case, standing):
                    changed.append(case)
        return changed

    @property
    def watches(self) -> bool:
        """Whether extraction is watched for."""
        return self._watch is not None

    def take_counts(self) -> FeedNote | None:
        """Return what became of the requests that extraction was told of since the last call, None if nothing."""
        return None if self._watch is None else self._watch.feed.counts.take()

    def take_lost(self) -> int:
        """Return how many events the audit log did not take since the last call."""
        return 0 if self._lost is None else self._lost.take()

    def close(self, case: Case) -> None:
        """End a request and forget its state; its last verdicts stay readable."""
        self._unread.pop(case.request.slot, None)
        try:
            self._record(case, "close")
        finally:
            self.scorer.close(case.request)
            if self._on_close is not None:
                self._on_close(case)

    def _decide(self, case: Case, standing: Standing | None) -> bool:
        decision = self.policy.decide(case.verdicts, standing)
        if case.request.principal in self._exempt:
            decision = replace(decision, action="observe", reason=f"{decision.reason}, but {_EXEMPT}")
        decision = self._recorded(case, "verdict", decision)
        if decision.severity <= case.decision.severity:
            return False
        case.decision = self._recorded(case, "action", decision)
        if self._on_decision is not None:
            self._on_decision(case)
        return True

    def _recorded(self, case: Case, event: Event, decision: Decision) -> Decision:
        """Record a decision, and return the one that holds: a request of which nothing is recorded is stopped."""
        recorded = self._record(case, event, decision)
        return decision if recorded or decision.action == "stop" else _UNRECORDED

    def _thresholds(self, prompt_tokens: int) -> np.ndarray:
        buckets = [detector.calibration.thresholds(prompt_tokens) for detector in self.guard.manifest.detectors]
        pairs = [[bucket.suspect.value for bucket in buckets], [bucket.breach.value for bucket in buckets]]
        return np.array(pairs, dtype=np.float32)

    def _record(self, case: Case, event: Event, decision: Decision | None = None, text: str | None = None) -> bool:
        """Record an event; return whether the log has it, or there is none."""
        if self._audit is None:
            return True
        verdict = decision.verdict if decision else None
        about = AuditEvent(
            request=case.request.id,
            principal=case.request.principal,
            event=event,
            position=case.position,
            coverage=case.coverage,
            guard=self.digest,
            patched_from=case.patched_from,
            text=text,
        )
        if decision is not None:
            about = about.model_copy(update={"action": decision.action, "reason": decision.reason})
        if verdict is not None:
            fields = ("detector", "zone", "score", "threshold")
            about = about.model_copy(update={name: getattr(verdict, name) for name in fields})
        try:
            self._audit.write(about)
        except OSError as error:
            if self._lost is None:
                raise
            self._lost.add(error)
            return False
        return True


def _heard(case: Case) -> Heard:
    assert case.asked is not None
    principal = case.request.principal or UNKNOWN
    return Heard(principal, tuple(case.prompt), case.asked, whole=not case.request.missing)


def _check_spans(guard: Guard) -> None:
    blind = [probe.name for probe in guard.probes if probe.aggregator.span == "tail"]
    if blind and not guard.manifest.template.tail:
        raise GuardError(f"{', '.join(blind)} read the template's tail, and this template has none; train again")
