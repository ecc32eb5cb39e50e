"""Which characters of a decoded text each of its tokens stands for."""

from collections.abc import Callable, Sequence

__all__ = ["token_places"]


def token_places(ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str]) -> list[tuple[int, int]]:
    """Return the first character of each token and the one after its last.

    Tokens that share a character, as those of one in several bytes do, each have all of it. Decoding starts anew where
    the text last agreed, one agreed stretch earlier, so that a decoder which drops a leading blank does not here.

    Args:
        ids: N token ids.
        text: what they decode to together.
        decode: decodes some of them.

    Returns:
        N pairs, both of whose members never fall.
    """
    places: list[tuple[int, int]] = []
    before = agreed = done = 0
    for stop in range(1, len(ids) + 1):
        added = decode(ids[before:stop])[len(decode(ids[before:agreed])) :]
        last = stop == len(ids)
        if not last and not (added and text.startswith(added, done)):
            continue
        end = len(text) if last else done + len(added)
        places += [(done, end)] * (stop - agreed)
        before, agreed, done = agreed, stop, end
    return places
