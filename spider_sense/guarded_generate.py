"""What stands in the place of a model's ``generate`` while a guard is in front of it."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from spider_sense.case import Case
from spider_sense.errors import ConfigError
from spider_sense.generate_arguments import GenerateArguments, read_arguments
from spider_sense.generation import GuardedCall
from spider_sense.interventions import Interventions
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel

__all__ = ["GuardedGenerate"]


class GuardedGenerate:
    """Runs a model's own ``generate``, one call at a time, and has every row of its batch judged.

    It takes two arguments more: ``principals``, one for each prompt, and ``request_id``.

    Args:
        loaded: the model and its tokenizer.
        judge: scores and decides.
        acts: patches and steers.
        text: returns a prompt as the audit log is to record it.
        check: called before each call; what it raises ends the call.
        on_begin: called with the cases of a call, in the order of its rows, before it runs.
        on_step: called after each judged step with the running cases.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        judge: Judge,
        acts: Interventions,
        text: Callable[[Sequence[int]], str | None],
        check: Callable[[], None],
        on_begin: Callable[[list[Case]], None],
        on_step: Callable[[Sequence[Case]], None] | None,
    ) -> None:
        self._model, self._tokenizer, self._generate = loaded.model, loaded.tokenizer, loaded.model.generate
        self._judge, self._acts, self._text, self._check = judge, acts, text, check
        self._on_begin, self._on_step = on_begin, on_step
        self._busy = threading.Lock()
        self.call: GuardedCall | None = None
        """The call that runs, if one does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate.

        Raises:
            ConfigError: if another call runs, or a guard could not follow what this one does.
            MismatchError: if its KV cache holds what was computed under a patch.
        """
        if not self._busy.acquire(blocking=False):
            raise ConfigError("a guarded generate is running on this model; wait for it, or use continuous batching")
        try:
            return self._judged(args, kwargs)
        finally:
            self._busy.release()

    def _judged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check()
        asked_for = read_arguments(args, kwargs, self._model.generation_config)
        if self._judge.policy.reads_again:
            asked_for.check_one_pass()
        others = dict(asked_for.others)
        call = self._begin(asked_for, others.pop("principals", None), others.pop("request_id", None))
        processors = [*(others.pop("logits_processor", None) or []), call]
        self._on_begin(call.cases)
        self.call = call
        try:
            output = self._generate(asked_for.ids_BP, **others, logits_processor=LogitsProcessorList(processors))
            call.finish((output if isinstance(output, Tensor) else output.sequences).shape[1])
        finally:
            self.call = None
            self._acts.act({})
            # A pass that raised has left its rows switched on.
            self._acts.end()
            call.close()
        return output

    def _begin(
        self, asked_for: GenerateArguments, principals: Sequence[str | None] | None, name: str | None
    ) -> GuardedCall:
        end_id = self._end_id(asked_for.eos_ids)
        return GuardedCall(
            self._judge,
            self._open_cases(asked_for, principals, name),
            np.repeat(asked_for.mask_BP, asked_for.copies, 0),
            asked_for.eos_ids,
            self._tokenizer(self._judge.policy.refusal, add_special_tokens=False)["input_ids"],
            self._tokenizer("\n\n", add_special_tokens=False)["input_ids"],
            end_id,
            self._acts.act,
            self._on_step,
            asked_for.assisted,
        )

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

    def _end_id(self, eos_ids: Sequence[int]) -> int:
        """Return the token that is to follow a refusal."""
        end_id = eos_ids[0] if eos_ids else self._tokenizer.eos_token_id
        if end_id is None:
            raise ConfigError(
                "the model has no end token, so a request cannot be stopped; pass eos_token_id to generate"
            )
        return int(end_id)
