"""Requests of transformers' continuous batching (``model.generate_batch``, ``transformers serve``) before the judge.

A stopped request ends with the token of the step that found it; the engine offers no way to append a refusal. Every
step waits for its own scores, whatever the policy says of ``same_step``.

KV blocks that a pass completes are withheld from other requests once the request is patched or steered, so what follows
them in a later prompt is computed anew. Copies of a prompt (``num_return_sequences``) share blocks that were filled
before its last token, and so before any verdict.
"""

import logging
from collections.abc import Callable, Hashable, Sequence, Set
from typing import Any

from torch import Tensor

from spider_sense.case import Case
from spider_sense.errors import ConfigError
from spider_sense.forward import SequenceRows
from spider_sense.judge import Judge
from spider_sense.policy import Policy
from spider_sense.scoring import RequestRows

__all__ = ["ContinuousCalls", "check_manager", "check_policy", "without_graphs"]

_log = logging.getLogger(__name__)

KEPT = 4096
"""Requests whose verdicts stay readable, the latest ones."""


class ContinuousCalls:
    """Judges packed batches.

    A request whose prompt begins with blocks that another request filled arrives with these tokens missing: unless the
    engine runs with ``allow_block_sharing=False``, the policy's ``on_missing`` decides about it.

    Args:
        judge: scores and decides.
        act: called before and after each step with the cases that are patched or steered by the ids of their requests.
        text: returns a prompt as the audit log is to record it.
        check: called before a request is judged for the first time; what it raises becomes the error of the requests
            of that step.
        principal: says who sends a request, by the engine's id; None where nobody knows.
    """

    def __init__(
        self,
        judge: Judge,
        act: Callable[[dict[Hashable, Case]], None],
        text: Callable[[Sequence[int]], str | None],
        check: Callable[[], None],
        principal: Callable[[str], str | None] | None = None,
    ) -> None:
        self._judge, self._act, self._text, self._check = judge, act, text, check
        self._principal = principal or (lambda _: None)
        self.cases: dict[str, Case] = {}
        """The latest request of each of the engine's ids; of those that have ended, the latest ``KEPT``."""
        self._running: dict[str, SequenceRows] = {}

    def begin(self, sequences: Sequence[SequenceRows]) -> None:
        """Tell new requests from those that run, before the pass in which a new one may bear the id of an old one."""
        self.sweep({_name(item) for item in sequences})
        for item in sequences:
            self._meet(item)
        self._act(self._acted_on())

    def scored(self, logits_TC: Tensor, sequences: Sequence[SequenceRows]) -> None:
        """Take the logits of a step, and end the requests that the policy stops."""
        self._judge.step(
            logits_TC, [RequestRows(self.cases[_name(item)].request, item.rows, item.positions) for item in sequences]
        )
        self._judge.decide(self._judge.read([self.cases[_name(item)] for item in sequences]))
        for item in sequences:
            case = self.cases[_name(item)]
            if case.decision.action == "stop":
                # The engine compares this with the tokens so far when it takes in the step's token. A preempted request
                # may come back in a record with a limit of its own, whatever was said of the one before.
                item.handle._new_tokens_limit = item.handle.generated_len() + 1
                if case.stopped_after is None:
                    case.stopped_after = _generated(item) + 1
        self._act(self._acted_on())

    def close(self) -> None:
        """Close every request."""
        for name in list(self._running):
            self._close(name)

    def _acted_on(self) -> dict[Hashable, Case]:
        return {name: self.cases[name] for name in self._running if self.cases[name].acted_on}

    def _meet(self, item: SequenceRows) -> None:
        # Ids begin anew with each manager, and a preempted request comes back in a record of its own.
        name, known = _name(item), self._running.get(_name(item))
        if known is None or (known.handle is not item.handle and not item.handle._true_initial_tokens):
            assert item.prompt is not None
            self._check()
            if known is not None:
                self._close(name)
            self.cases.pop(name, None)
            principal, text = self._principal(name), self._text(item.prompt)
            self.cases[name] = self._judge.open(name, item.prompt, principal, text)
            self._forget_oldest()
        self._running[name] = item

    def _forget_oldest(self) -> None:
        """Keep a server's memory bounded."""
        ended = [name for name in self.cases if name not in self._running]
        for name in ended[: max(0, len(self.cases) - KEPT)]:
            del self.cases[name]

    def sweep(self, computed: Set[str] = frozenset()) -> None:
        """Close what the engine has ended, or forgotten because it was cancelled.

        Args:
            computed: requests of the step that begins, which may have ended and are not closed before it.
        """
        for name, item in list(self._running.items()):
            if name not in computed and item.runs is not None and not item.runs():
                self._close(name)

    def _close(self, name: str) -> None:
        del self._running[name]
        self._judge.close(self.cases[name])


def check_policy(policy: Policy) -> None:
    """Check that continuous batching, which cannot read a prompt again, can do what a policy says.

    Raises:
        ConfigError: if a patch is to begin with the prompt.
    """
    if policy.reads_again:
        raise ConfigError(
            "patch.begin is 'prompt', and transformers' continuous batching cannot read a prompt again; call "
            "model.generate, start the server without --continuous-batching or with vLLM, or leave patch.begin "
            "out, so that a patch begins at the next token"
        )


def check_manager(manager: Any) -> None:
    """Check that a manager from before, if there is one, has captured no graphs.

    Raises:
        ConfigError: if it has.
    """
    if manager is not None and manager.batch_processor is not None and _replays(manager):
        raise ConfigError(
            f"continuous batching runs with use_cuda_graph={manager.continuous_batching_config.use_cuda_graph}, and a "
            "graph that is replayed runs no hooks; call destroy_cached_continuous_batching_manager on the model first"
        )


def without_graphs(manager: Any) -> Any:
    """Return a new manager, made to run each step, and so the model's hooks, where it would replay a graph of it."""
    if _replays(manager):
        config = manager.continuous_batching_config
        # Steps overlap by default where there are graphs.
        config.use_cuda_graph, config.use_async_batching = (False, False), False
        _log.warning(
            "continuous batching under a guard runs without CUDA graphs: a graph that is replayed runs no hooks"
        )
    return manager


def _replays(manager: Any) -> bool:
    return manager.continuous_batching_config.use_cuda_graph not in (None, False, (False, False))


def _name(item: SequenceRows) -> str:
    assert isinstance(item.key, str)
    return item.key


def _generated(item: SequenceRows) -> int:
    """Return how many tokens were generated, those included that a preempted request has as part of its prompt."""
    assert item.prompt is not None
    return len(item.handle.initial_tokens) - len(item.prompt) + int(item.handle.generated_len())
