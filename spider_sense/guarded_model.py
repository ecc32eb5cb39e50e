"""A model while a guard is in front of it: its hooks, and what wraps ``generate`` and continuous batching."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from spider_sense.attach import Attachment
from spider_sense.case import Case
from spider_sense.continuous import ContinuousCalls, check_manager, check_policy, without_graphs
from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.fingerprint import serving_config
from spider_sense.forward import Forward, read_forward
from spider_sense.guarded_generate import GuardedGenerate
from spider_sense.interventions import Interventions
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel

__all__ = ["GuardedModel", "is_guarded"]


class GuardedModel:
    """Hooks a model and wraps its ``generate`` and its continuous batching, until ``detach``.

    Args:
        loaded: the model and its tokenizer.
        judge: scores and decides.
        acts: patches and steers.
        on_begin: called with the cases of a ``generate`` call, in the order of its rows, before it runs.
        on_step: called after each judged step of ``generate`` with the running cases.
        principal: says who sends a request of continuous batching, by the engine's id; None where nobody knows.

    Raises:
        SiteError: if the model lacks a site of the guard; nothing is changed then.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        judge: Judge,
        acts: Interventions,
        on_begin: Callable[[list[Case]], None],
        on_step: Callable[[Sequence[Case]], None] | None = None,
        principal: Callable[[str], str | None] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._judge, self._acts = loaded.model, loaded.tokenizer, judge, acts
        self._serving = serving_config(loaded.model)
        self.generate = GuardedGenerate(loaded, judge, acts, self._text, self._check_unchanged, on_begin, on_step)
        self.continuous = ContinuousCalls(judge, acts.act, self._text, self._check_continuous, principal)
        readers = {site: judge.bank.tap(site) for site in judge.bank.sites}
        self._attachment = Attachment(
            loaded.model, readers, self._begin, self._end, acts.writers(), acts.patchers(), acts.end
        )
        self._attachment.forward_rows = self._name_rows
        self._batching = loaded.model.init_continuous_batching
        self._undo = ExitStack()
        self._undo.callback(self.continuous.close)
        self._wrap("generate", self.generate)
        self._wrap("init_continuous_batching", self._checked_batching)
        self._undo.callback(self._attachment.detach)
        self.attached = True

    def detach(self) -> None:
        """Leave the model as it was, and close what continuous batching runs; calling it twice is harmless."""
        self.attached = False
        self._undo.close()

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Put something in the place of a method, on the instance, until ``detach``."""
        own = vars(self._model).get(name)
        setattr(self._model, name, wrapper)
        self._undo.callback(_restore, self._model, name, own)

    def _name_rows(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Forward:
        call = self.generate.call
        return call.name_rows(args, kwargs) if call else read_forward(args, kwargs)

    def _begin(self, forward: Forward) -> None:
        call = self.generate.call
        self._forward = forward
        self._packed = any(item.prompt is not None for item in forward.sequences)
        self._judge.bank.begin(forward.total)
        if self._packed and call is None:
            self.continuous.begin(forward.sequences)
        self._acts.begin(forward, call.cache if call else None)

    def _end(self) -> bool:
        self._acts.end()
        forward, call = self._forward, self.generate.call
        if self._packed and call is not None:
            # The two share the buffer of the step, so neither would know whose scores it holds.
            raise SpiderSenseError("generate and continuous batching ran at once on a guarded model; use one at a time")
        if self._packed:
            self.continuous.scored(self._judge.bank.logits(forward.total), forward.sequences)
        elif call is not None:
            return call.scored(self._judge.bank.logits(forward.total))
        return False

    def _checked_batching(self, *args: Any, **kwargs: Any) -> Any:
        # What is raised in the engine's thread would stand in the outputs of requests.
        self._check_continuous()
        check_manager(getattr(self._model, "_cached_continuous_batching_manager", None))
        return without_graphs(self._batching(*args, **kwargs))

    def _check_continuous(self) -> None:
        check_policy(self._judge.policy)
        if self._judge.prompts.watched:
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

    def _text(self, prompt: Sequence[int]) -> str | None:
        """Return a prompt as text if the audit log was asked to keep it."""
        return str(self._tokenizer.decode(prompt)) if self._judge.recorder.keeps_text else None


def is_guarded(model: Any) -> bool:
    """Return whether a guard is in front of a model already."""
    return isinstance(vars(model).get("generate"), GuardedGenerate)


def _restore(model: Any, name: str, own: Any) -> None:
    delattr(model, name)
    if own is not None:
        setattr(model, name, own)
