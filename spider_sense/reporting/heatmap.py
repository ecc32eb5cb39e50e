"""The heat map of a conversation: every token on a ground of blue (against) or vermilion (for), breaches underlined."""

import math
from collections.abc import Iterable, Sequence

from spider_sense.reporting.escaped import escaped
from spider_sense.reporting.report import Conversation, Token, Track

__all__ = ["colour_scale", "heat_map", "strongest"]

STRONGEST = 5


def colour_scale(conversations: Sequence[Conversation], detector: int) -> float:
    """Return the contribution that gets full colour: the 98th percentile of their sizes over all conversations."""
    tokens = (token for item in conversations for token in item.tracks[detector].tokens)
    sizes = sorted(abs(token.contribution) for token in tokens if token.contribution is not None)
    return sizes[math.ceil(0.98 * len(sizes)) - 1] or 1.0 if sizes else 1.0


def heat_map(track: Track, full: float) -> str:
    """Return the tokens of prompt and response as HTML.

    Args:
        track: what to show.
        full: contribution that gets full colour.
    """
    parts = [("Prompt", False), ("Response", True)]
    return "".join(
        f'<div class="part"><h4>{name}</h4><p class="tokens">{_spans(track, response, full)}</p></div>'
        for name, response in parts
    )


def strongest(track: Track) -> str:
    """Return the tokens with the largest contributions as HTML, so that colour is not the only way to find them."""
    scored = [token for token in track.tokens if token.contribution is not None]
    top = sorted(scored, key=lambda token: abs(token.contribution or 0.0), reverse=True)[:STRONGEST]
    items = "".join(f"<li><q>{_visible(token)}</q> <b>{token.contribution:+.2f}</b></li>" for token in top)
    return f'<ol class="strongest">{items}</ol>'


def _spans(track: Track, response: bool, full: float) -> str:
    spans = [_span(token, track, full) for token in track.tokens if token.response == response]
    return "".join(spans) or '<span class="quiet">nothing</span>'


def _span(token: Token, track: Track, full: float) -> str:
    text = escaped(token.text).replace("\n", "<i>⏎</i>\n") or "<i>·</i>"
    return (
        f'<span class="{" ".join(_classes(token, track))}"{_strength(token, full)} title="{_tip(token)}">{text}</span>'
    )


def _classes(token: Token, track: Track) -> Iterable[str]:
    yield "t"
    if token.contribution is None:
        yield "unscored"
    else:
        yield "for" if token.contribution > 0 else "against"
    if token.readout is not None and token.readout >= track.breach:
        yield "breached"
    elif token.readout is not None and token.readout >= track.suspect:
        yield "suspected"


def _strength(token: Token, full: float) -> str:
    if token.contribution is None:
        return ""
    return f' style="--a:{0.72 * min(abs(token.contribution) / full, 1.0):.3f}"'


def _tip(token: Token) -> str:
    lines = [f"{_visible(token)} at position {token.position}"]
    if token.logit is None or token.contribution is None:
        lines.append("not scored")
    else:
        lines.append(f"token logit {token.logit:+.3f}")
        lines.append(f"contribution {token.contribution:+.4f}")
    if token.readout is not None:
        lines.append(f"running readout {token.readout:.3f}")
    return "&#10;".join(lines)


def _visible(token: Token) -> str:
    """Return a token on one line, escaped."""
    return escaped(token.text).replace("\n", "⏎").strip(" ") or "␠" * len(token.text) or "·"
