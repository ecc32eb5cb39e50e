"""What vLLM would tell of a prompt, and is told to nobody whose request is stopped before it was."""

from typing import Any

__all__ = ["withhold_prompt"]


def withhold_prompt(state: Any) -> None:
    """Give each token of a prompt a place without log-probabilities, unless the client has been told them.

    A client asks for them by ``prompt_logprobs``, or by ``echo`` with ``logprobs``, and vLLM's answer has to have one
    for each token; without the answer's tokens they may be all that is asked for.

    Args:
        state: vLLM's ``RequestState`` of a request that is stopped.
    """
    processor = state.logprobs_processor
    told = None if processor is None else processor.prompt_logprobs
    # It begins with the first token's, before which there is nothing, and is empty once it was handed out.
    if told is not None and len(told) == 1:
        told.extend([None] * (len(state.prompt_token_ids) - 1))
