"""The guard in vLLM's scheduler: ends requests that are to be stopped, and puts the verdict into the answers."""

from collections.abc import Callable, Mapping
from typing import Any

from spider_sense.errors import SpiderSenseError
from spider_sense.guard import Guard
from spider_sense.serving.findings import Findings, Note
from spider_sense.serving.settings import KEY, ServingSettings

__all__ = ["ACTOR", "Actor", "End", "ReadAgain", "SwitchOn", "Tell"]

ACTOR = "_spider_sense_actor"
"""Attribute of a scheduler that holds its actor."""
_WORTH_TELLING = 0.05
"""Seconds of the guard that are told though there is nothing else to tell: a note a step would cost more than they."""
End = Callable[[Any, dict[int, Any], str, list[int], str], None]
"""Takes the scheduler, the outputs of the step by client, a request's id, its last tokens and the stop reason."""
Tell = Callable[[dict[int, Any], Note], None]
"""Takes the outputs of the step by client, and what the step tells the front end."""
SwitchOn = Callable[[Any, str, int], None]
"""Takes the scheduler, a request's id and how many of its tokens were computed; a second call changes nothing."""
ReadAgain = Callable[[Any, str], bool]
"""Takes the scheduler and a request's id, and says whether the request begins once more, which it does once at most."""


class Actor:
    """Acts on the findings of each step.

    Args:
        settings: what the server was told.
        refusal: token ids of the refusal, and of what sets it apart from an answer that has begun.
        end: finishes a running request with last tokens and a stop reason.
        tell: sends a note to the processes that answer clients.
        switch_on: patches a running request from its next step on.
        read_again: lets a request that is to be patched, and has no token of an answer yet, begin once more; None
            where the policy does not want that.
    """

    def __init__(
        self,
        settings: ServingSettings,
        refusal: tuple[list[int], list[int]],
        end: End,
        tell: Tell,
        switch_on: SwitchOn,
        read_again: ReadAgain | None,
    ) -> None:
        guard = Guard.from_pretrained(settings.guard)
        self._detectors = tuple(detector.name for detector in guard.manifest.detectors)
        self._digest, self._scores = guard.digest, settings.scores
        (self._refusal, self._break), self._end, self._tell = refusal, end, tell
        self._switch_on, self._read_again = switch_on, read_again
        self._latest: dict[str, tuple[Findings, int]] = {}
        self._kept: dict[str, tuple[Any, Any]] = {}
        """What vLLM computed of prompts that are being read again, and may not compute a second time."""
        self._seconds = 0.0
        """That the guard took on the host and nobody was told of."""

    def update(self, original: Callable[..., Any], scheduler: Any, step: Any, output: Any) -> Any:
        """Run the scheduler's own update with the tokens of stopped requests taken away, end those, and patch others.

        Raises:
            SpiderSenseError: if rows were computed and nothing is found of them: the guard does not run.
        """
        findings: Findings | None = getattr(output, "spider_sense", None)
        if findings is None:
            if step.total_num_scheduled_tokens:
                raise SpiderSenseError(
                    "the worker computed a step and no guard says anything of it; see the worker's log for why"
                )
            outputs = original(step, output)
            self._tell_of(scheduler, outputs, None)
            return outputs
        # A step that was on its way when a request ended may still hold it, which must not count it twice.
        known = self._latest.keys() | {new.req_id for new in step.scheduled_new_reqs}
        self._latest |= {name: (findings, row) for row, name in enumerate(findings.ids) if name in known}
        stopped = {name for name in findings.stops if _runs(scheduler, name)}
        for name in stopped:
            output.sampled_token_ids[output.req_id_to_index[name]] = []
            # Without a new token vLLM expects none of these, and without an answer a client is told none.
            for extra in _extras(output):
                extra.pop(name, None)
        self._give_back(scheduler, output)
        self._begin_again(scheduler, output, findings)
        outputs = original(step, output)
        for name in stopped:
            begun = scheduler.requests[name].num_output_tokens > 0
            tokens = [*(self._break if begun else ()), *self._refusal]
            self._end(scheduler, outputs, name, tokens, f"{KEY}: {findings.stops[name]}")
        # Only now does the scheduler know which drafts were rejected.
        for name, computed in findings.patches.items():
            if _runs(scheduler, name):
                self._switch_on(scheduler, name, computed)
        for one in (one for group in outputs.values() for one in group.outputs):
            if one.finish_reason is not None or _has_stop_strings(scheduler, one.request_id):
                one.kv_transfer_params = {**(one.kv_transfer_params or {}), KEY: self._answer(one.request_id)}
        self._tell_of(scheduler, outputs, findings)
        return outputs

    def _begin_again(self, scheduler: Any, output: Any, findings: Findings) -> None:
        if self._read_again is None:
            return
        # Each goes to the head of the queue.
        for name in reversed(findings.patches):
            if _runs(scheduler, name) and self._read_again(scheduler, name):
                prompt, ids = (extra.pop(name, None) for extra in _extras(output))
                self._kept[name] = prompt, ids

    def _give_back(self, scheduler: Any, output: Any) -> None:
        """Add what was computed of prompts at their first reading to the step that has the first token."""
        for name in list(self._kept):
            place = output.req_id_to_index.get(name)
            if name not in scheduler.requests:
                del self._kept[name]
            elif place is not None and output.sampled_token_ids[place]:
                for extra, kept in zip(_extras(output), self._kept.pop(name), strict=True):
                    if extra.get(name) is None and kept is not None:
                        extra[name] = kept

    def _tell_of(self, scheduler: Any, outputs: dict[int, Any], findings: Findings | None) -> None:
        """Tell what there is to count and what comes of whom, and forget the requests that have ended."""
        gone = [self._latest.pop(name) for name in list(self._latest) if name not in scheduler.requests]
        note = Note(seconds=0.0, ended=[found.ended(row) for found, row in gone], throttled=[])
        if findings is not None:
            self._seconds += findings.seconds
            note["throttled"] = list(findings.throttled)
            if findings.hushed:
                note["hushed"] = list(findings.hushed)
            if findings.extraction is not None:
                note["extraction"] = findings.extraction
            if findings.unrecorded:
                note["unrecorded"] = findings.unrecorded
        if any(note.values()) or self._seconds > _WORTH_TELLING:
            note["seconds"], self._seconds = self._seconds, 0.0
            self._tell(outputs, note)

    def _answer(self, name: str) -> Mapping[str, Any] | None:
        found = self._latest.get(name)
        return None if found is None else found[0].answer(found[1], self._detectors, self._digest, self._scores)


def _extras(output: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return output.prompt_logprobs_dict, output.prompt_token_id_logprobs_dict


def _runs(scheduler: Any, name: str) -> bool:
    request = scheduler.requests.get(name)
    return request is not None and not request.is_finished()


def _has_stop_strings(scheduler: Any, name: str) -> bool:
    """Whether any output of a request may be its last: only the front end sees text, and ends it at a stop string."""
    request = scheduler.requests.get(name)
    sampling = None if request is None else request.sampling_params
    return sampling is not None and bool(sampling.stop)
