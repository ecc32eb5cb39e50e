"""What is wrong with a row of a log, in words."""

from json import JSONDecodeError

from pydantic_core import ErrorDetails

from spider_sense.extraction.layout import LINK_KINDS

__all__ = ["ALLOWED", "fault_in_words", "unread_in_words"]

_COUNT = "a whole number from 0 to 2,147,483,647"
_NUMBERS = "a list of finite numbers"
ALLOWED = {
    "principal": "a name",
    "time": "seconds since 1970, not milliseconds, or an ISO 8601 date",
    "text": "text",
    "messages": 'a list of {"role": ..., "content": ...} whose contents are text',
    "hidden": f"{_NUMBERS}, the mean of h / rms(h)",
    "sketch": _NUMBERS,
    "probes": _NUMBERS,
    "tenant": "at most 24 printable ASCII characters",
    "family": "text",
    "parameters": "an object, sampling parameters by name",
    "links": f"an object, text by kind: {', '.join(LINK_KINDS)}",
    "logit_bias": f"token ids, each {_COUNT}, or an object of biases by token id",
    "top_logprobs": _COUNT,
    "max_tokens": _COUNT,
    "n": "a whole number from 1 to 65,536",
}
"""What each field of a row may hold, in words."""


def fault_in_words(fault: ErrorDetails) -> str:
    """Return the field, what it holds and what is allowed."""
    where = ".".join(map(str, fault["loc"]))
    match fault["type"]:
        case "missing":
            return f"{where!r} is missing; add it"
        case "value_error":
            return f"{where + ': ' if where else ''}{fault['ctx']['error']}"
    # A turn of WildChat is read on its own, without the field that it stands in.
    allowed = ALLOWED.get(where.partition(".")[0], ALLOWED["messages"])
    return f"{where or 'a turn'}: {fault['input']!r:.60} is not allowed; give {allowed}"


def unread_in_words(line: bytes, error: JSONDecodeError | UnicodeDecodeError) -> str:
    """Return what stands in a line that is no JSON, and what is expected."""
    found = f"{line.decode(errors='replace').strip()!r:.60}"
    fault = f"no JSON ({error.msg} at character {error.pos})" if isinstance(error, JSONDecodeError) else "no UTF-8"
    return f"{found} is {fault}; give one JSON object a line"
