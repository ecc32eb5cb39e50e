"""Only seams: what an engine tells the processes that answer clients, as an output for a request that does not exist.

Their own requests never carry it, so no client can be handed a score by mistake, and requests that a client left are
counted like any other.
"""

from collections.abc import Mapping
from typing import Any

from spider_sense.serving.findings import Note
from spider_sense.serving.settings import KEY

__all__ = ["announce", "opened", "send"]


def send(clients: int, outputs: dict[int, Any], note: Note) -> None:
    """Put a note into the outputs of a step.

    Args:
        clients: number of processes that answer clients; whichever gets the note counts, and all hear who is slowed
            or hushed.
        outputs: by client.
        note: of the step.
    """
    from vllm.v1.engine import EngineCoreOutputs

    counts = next(iter(outputs), 0)
    for_all = Note(seconds=0.0, ended=[], throttled=note["throttled"], hushed=note.get("hushed", []))
    for client in {counts, *(range(clients) if for_all["throttled"] or for_all["hushed"] else ())}:
        told = note if client == counts else for_all
        outputs.setdefault(client, EngineCoreOutputs()).outputs.append(_letter(told))


def announce(core: Any, said: Mapping[str, Any]) -> None:
    """Tell every process that answers clients what is in force from now on.

    Args:
        core: the engine core, in a process of its own.
        said: as of :func:`spider_sense.serving.about.about`.
    """
    from vllm.v1.engine import EngineCoreOutputs

    for client in range(core.vllm_config.parallel_config._api_process_count):
        core.output_queue.put_nowait((client, EngineCoreOutputs(outputs=[_letter({"in_force": said})])))


def opened(received: Any) -> Mapping[str, Any] | None:
    """Take the letter out of what a client of the engine has received; None if there is none."""
    if received.outputs and received.outputs[-1].request_id == KEY and received.outputs[-1].kv_transfer_params:
        told: Mapping[str, Any] = received.outputs.pop().kv_transfer_params
        return told
    return None


def _letter(told: Mapping[str, Any]) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(request_id=KEY, new_token_ids=[], kv_transfer_params={**told})
