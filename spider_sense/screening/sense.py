"""Senses a conversation: one forward pass of the served model, and what its probes make of every span.

Shape letters: S tokens of a conversation, C logit columns, H heads, D width.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sense_kernels import PROMPT, WATCHED, FoldRows, fold
from spider_sense.attach import Attachment
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.layouts import positions
from spider_sense.models import LoadedModel
from spider_sense.scoring import Bank, Probe
from spider_sense.screening.drift import DRIFT, Places, drift, opening
from spider_sense.screening.pooling import pool
from spider_sense.screening.sensed import Sensed
from spider_sense.screening.span import Conversation
from spider_sense.screening.stage_guard import StageGuard, stage_zone
from spider_sense.types import Coverage, Site, Verdict

__all__ = ["ModelSense", "drift_logit", "span_scores"]


class ModelSense:
    """Reads the stages of a conversation off the model's activations; see `spider_sense.screening.protocols.Sense`.

    Args:
        loaded: the served model.
        stages: its probes; None if only activations are wanted.
        site: where the activations of spans are read for signatures; None if none are.

    Raises:
        MismatchError: if the probes were made for another model.
        SiteError: if the model has no such site.
    """

    def __init__(self, loaded: LoadedModel, stages: StageGuard | None = None, site: Site | None = None) -> None:
        if stages is not None:
            stages.guard.check_model(fingerprint(loaded), serving_config(loaded.model))
        self._loaded, self._stages, self._site = loaded, stages, site
        model = loaded.model
        self._bank = Bank(stages.guard.probes, model.device, dtype=model.dtype) if stages else None
        self._opens = opening(loaded.tokenizer) if stages else ()
        self._hidden_SD: Tensor | None = None
        # Hooks see every pass of the model, so two conversations at once would read each other's.
        self._lock = Lock()

    @torch.inference_mode()
    def sense(self, conversation: Conversation) -> list[Sensed]:
        """Run the model once over a conversation and return what is sensed of each span, in order.

        A conversation longer than the model's positions is not run: nothing that it would say there means anything, so
        nothing is sensed of any span, which is suspect.
        """
        limit = positions(self._loaded.model)
        if not conversation.spans or (limit is not None and len(conversation.ids) > limit):
            return [Sensed(verdicts=())] * len(conversation.spans)
        with self._lock, self.attached():
            self.run(conversation.ids)
            return self.read(conversation)

    def read(self, conversation: Conversation) -> list[Sensed]:
        """Return what is sensed of each span by what the last pass, which was over this conversation, left behind."""
        verdicts = self._verdicts(conversation)
        pooled = [None if self._hidden_SD is None else pool(self._hidden_SD, span) for span in conversation.spans]
        return [Sensed(verdicts=found, pooled_D=row) for found, row in zip(verdicts, pooled, strict=True)]

    def attached(self) -> Attachment:
        """Return the hooks, to be entered: one who runs many conversations need not hang them up for each."""
        bank = self._bank
        taps = {site: [bank.tap(site)] for site in bank.sites} if bank else {}
        if self._site is not None:
            taps.setdefault(self._site, []).append(self._keep)
        readers = {site: _each(members) for site, members in taps.items()}
        return Attachment(self._loaded.model, readers, lambda forward: self._begin(forward.total), lambda: None)

    def _begin(self, rows: int) -> None:
        self._hidden_SD = None
        if self._bank is not None:
            self._bank.begin(rows)

    def _keep(self, hidden: Tensor) -> None:
        self._hidden_SD = hidden.detach().flatten(0, -2)

    def run(self, ids: Sequence[int]) -> None:
        """Run the model once over a conversation's tokens, under the hooks or without."""
        model: Any = self._loaded.model
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)

    def _verdicts(self, conversation: Conversation) -> list[tuple[Verdict, ...]]:
        if self._bank is None or self._stages is None:
            return [()] * len(conversation.spans)
        logits_SC = self._bank.logits(len(conversation.ids))
        scores_NH = span_scores(self._bank, logits_SC, [(span.start, span.stop) for span in conversation.spans])
        result = []
        for place, span in enumerate(conversation.spans):
            heads = self._stages.heads(span.stage) if span.stop > span.start else []
            found = [
                self._verdict(head, conversation, place, float(scores_NH[place, head]), logits_SC) for head in heads
            ]
            result.append(tuple(verdict for verdict in found if verdict is not None))
        return result

    def _verdict(
        self, head: int, conversation: Conversation, place: int, score: float, logits_SC: Tensor
    ) -> Verdict | None:
        assert self._stages is not None
        assert self._bank is not None
        record, span = self._stages.guard.manifest.detectors[head], conversation.spans[place]
        position, tokens = span.stop - 1, span.stop - span.start
        if record.name == DRIFT:
            places = drift(conversation.ids, span, self._opens)
            if places is None:
                return None
            score = drift_logit(self._bank, self._bank.probes[head], logits_SC, places)
            position = places[1].stop - 1
        thresholds = record.calibration.thresholds(tokens)
        found = stage_zone(score, thresholds)
        return Verdict(record.name, score, thresholds.breach.value, found, position, Coverage(scored=tokens))


def span_scores(bank: Bank, logits_SC: Tensor, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Fold each span by itself, as training and calibration do.

    Args:
        bank: H heads.
        logits_SC: [S, C] of the whole conversation.
        spans: first and last plus one of N spans.

    Returns:
        The readout at the end of each span [N, H], float64; NaN of an empty one.
    """
    scores_NH = np.full((len(spans), bank.table.heads), np.nan)
    filled = [place for place, (start, stop) in enumerate(spans) if stop > start]
    if filled:
        row_R = np.concatenate([np.arange(*spans[place]) for place in filled])
        end_B = np.cumsum([spans[place][1] - spans[place][0] for place in filled])
        code_R = np.full(len(row_R), PROMPT)
        code_R[end_B - 1] |= WATCHED
        state = bank.table.new_state(len(filled), bank.device)
        rows = FoldRows(row_R, code_R, np.concatenate(([0], end_B)), np.arange(len(filled)))
        fold(*state, logits_SC, rows, bank.table)
        scores_NH[filled] = state.peak.double().cpu().numpy()
    return scores_NH


def drift_logit(bank: Bank, probe: Probe, logits_SC: Tensor, places: Places) -> float:
    """Return the logit of the mean difference of activations: the mean difference of logits, plus the bias once."""
    column_S = logits_SC[:, bank.columns_of(probe).start].double()
    before, after = (column_S[place].mean() for place in places)
    bias = sum(float(part.bias[0]) for part in probe.maps.values())
    return float(after - before) + bias


def _each(members: Sequence[Any]) -> Any:
    if len(members) == 1:
        return members[0]

    def read(hidden: Tensor) -> None:
        for member in members:
            member(hidden)

    return read
