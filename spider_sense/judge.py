"""The judge: from maxima over time to zones, verdicts, decisions and audit records, for many requests at once.

It knows nothing of the engine: one feeds it logits and asks what is to be done.

Shape letters: B requests, H heads, T packed rows, C logit columns.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spider_sense.audit import AuditLog
from spider_sense.case import Case
from spider_sense.chat import unscored
from spider_sense.decision import Decision
from spider_sense.errors import GuardError
from spider_sense.extraction.observation import Asked
from spider_sense.extraction.standing import Standing
from spider_sense.extraction.watch import Watch
from spider_sense.guard import Guard
from spider_sense.lost_events import LostEvents
from spider_sense.policy import Policy
from spider_sense.recorder import UNRECORDED, Recorder
from spider_sense.scoring import Bank, Probe, RequestRows, Scorer
from spider_sense.types import ZONES
from spider_sense.watched_prompts import WatchedPrompts

__all__ = ["NOTHING", "Judge", "Reading"]

_BREACH = ZONES.index("breach")
NOTHING, _EXEMPT = "nothing asks for an action", "its principal is exempt: nothing is done about it"


@dataclass(frozen=True, slots=True)
class Reading:
    """Scores on their way to the host."""

    cases: tuple[Case, ...]
    positions: tuple[int, ...]
    """Last token that each score includes."""
    counts: tuple[tuple[int, int, int], ...]
    """Tokens of each request that were scored, cached and missing until then; the next step may be folded already."""
    host: Tensor
    """[1, B, H] maxima over time, or [2, B, H] with the readouts; valid after ``event``."""
    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait until they are there."""
        if self.event is not None:
            self.event.synchronize()


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
        self.prompts, self.recorder = WatchedPrompts(watch), Recorder(audit, lost)
        self._keep_history, self._on_decision, self._on_close = keep_history, on_decision, on_close
        self._exempt = frozenset(exempt)
        self.bank = Bank(self._probes(guard), device, rows, dtype)
        self._take(guard, policy)

    def exchange(self, guard: Guard, policy: Policy) -> None:
        """Judge by another guard of the same sites from now on, while no request is open.

        Raises:
            GuardError: if its probes do not fit the taps; nothing is changed then.
        """
        _check_spans(guard)
        policy.check_watched(self.prompts.watched)
        try:
            self.bank.exchange(self._probes(guard))
        except ValueError as error:
            raise GuardError(f"{error}; start anew with this guard") from error
        self._take(guard, policy)

    def _probes(self, guard: Guard) -> tuple[Probe, ...]:
        return (*guard.probes, *self.prompts.probes)

    def _take(self, guard: Guard, policy: Policy) -> None:
        self.guard, self.policy, self.digest = guard, policy, guard.digest
        self.recorder.guard = guard.digest
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
            if not self.recorder.record(case, "open", text=text):
                case.decision = UNRECORDED
                if self._on_decision is not None:
                    self._on_decision(case)
            undo.pop_all()
        if not canary:
            self.prompts.begin(case, prompt, asked)
        return case

    def step(self, logits_TC: Tensor, rows: Sequence[RequestRows]) -> None:
        """Fold a step of the engine; see :meth:`spider_sense.scoring.Scorer.step`."""
        self.scorer.step(logits_TC, rows)
        if self.prompts.unread:
            self.prompts.tell(rows, self.scorer, len(self._names))

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
            event.record(torch.cuda.current_stream(self.bank.device))
        counts = tuple((case.request.scored, case.request.cached, case.request.missing) for case in cases)
        return Reading(tuple(cases), tuple(case.request.position - 1 for case in cases), counts, host, event)

    def decide(self, reading: Reading) -> list[Case]:
        """Turn a reading into verdicts and decisions.

        Returns:
            The cases whose decision has become stricter.
        """
        if not reading.cases:
            return []
        reading.wait()
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
        rows = zip(reading.cases, reading.positions, reading.counts, peak_BH, zone_BH, raised_B, strict=True)
        for case, position, counts, peak_H, zone_H, raised in rows:
            if case.closed:
                continue  # a step that was on its way when it ended may still hold it
            case.counts = counts
            if case.decision.action == "stop":
                continue  # it keeps the verdict that stopped it
            case.peak, case.position = peak_H, position
            # Until its prompt is read a request is no evidence, and whoever is never heard would never be cleared.
            stands = case.standing is not None and position >= case.request.prompt_length - 1
            if stands or counts[2] > case.missing or (raised and (zone_H > case.zone).any()):
                case.missing = counts[2]
                case.zone = np.maximum(case.zone, zone_H)
                standing, case.standing = (case.standing, None) if stands else (None, case.standing)
                if self._decide(case, standing):
                    changed.append(case)
        return changed

    def close(self, case: Case) -> None:
        """End a request and forget its state; its last verdicts stay readable."""
        self.prompts.forget(case)
        case.closed = True
        try:
            self.recorder.record(case, "close")
        finally:
            self.scorer.close(case.request)
            if self._on_close is not None:
                self._on_close(case)

    def _decide(self, case: Case, standing: Standing | None) -> bool:
        decision = self.policy.decide(case.verdicts, standing)
        if case.request.principal in self._exempt:
            decision = replace(decision, action="observe", reason=f"{decision.reason}, but {_EXEMPT}")
        decision = self.recorder.decided(case, "verdict", decision)
        if decision.severity <= case.decision.severity:
            return False
        case.decision = self.recorder.decided(case, "action", decision)
        if self._on_decision is not None:
            self._on_decision(case)
        return True

    def _thresholds(self, prompt_tokens: int) -> np.ndarray:
        buckets = [detector.calibration.thresholds(prompt_tokens) for detector in self.guard.manifest.detectors]
        pairs = [[bucket.suspect.value for bucket in buckets], [bucket.breach.value for bucket in buckets]]
        return np.array(pairs, dtype=np.float32)


def _check_spans(guard: Guard) -> None:
    blind = [probe.name for probe in guard.probes if probe.aggregator.span == "tail"]
    if blind and not guard.manifest.template.tail:
        raise GuardError(f"{', '.join(blind)} read the template's tail, and this template has none; train again")
