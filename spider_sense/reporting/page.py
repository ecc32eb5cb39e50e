"""Renders a report as one HTML page that needs nothing from outside: no network, no scripts."""

from spider_sense.reporting.charts import by_layer, layer_chart, roc_chart, time_chart
from spider_sense.reporting.escaped import escaped
from spider_sense.reporting.heatmap import colour_scale, heat_map, strongest
from spider_sense.reporting.report import Conversation, DetectorFacts, Report
from spider_sense.reporting.style import STYLE
from spider_sense.reporting.tables import candidate_bars, systems_table, thresholds_table

__all__ = ["render"]

# Prompts are hostile input. Should one ever slip past the escaping, the browser still runs and fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MARKS = {"clear": "○", "suspect": "◐", "breach": "●"}


def render(report: Report) -> str:
    """Return the page; the same report always gives the same text."""
    scales = [colour_scale(report.conversations, index) for index in range(len(report.detectors))]
    conversations = "".join(_conversation(item, scales) for item in report.conversations)
    detectors = "".join(_detector(item) for item in report.detectors)
    limits = "".join(f"<li>{escaped(line)}</li>" for line in report.limits)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Spider-Sense report: {escaped(report.guard.model)}</title><style>{STYLE}</style></head><body><main>"
        f"{_header(report)}"
        f"<section><h2>Conversations</h2><p>{escaped(report.origin)} Each was answered by the model under the guard in "
        f"shadow mode: scored, never acted on.</p>{_legend(scales)}{conversations}</section>"
        f'{detectors}<section class="limits"><h2>What these numbers do not show</h2><ul>{limits}</ul></section>'
        f"{_footer(report)}</main></body></html>\n"
    )


def _header(report: Report) -> str:
    guard = report.guard
    facts = [
        ("Model", f"{guard.model} ({guard.architecture}, {guard.layers} layers)"),
        ("Guard", guard.digest),
        *((f"Detector {item.name}", f"{item.family}, read at {', '.join(item.sites)}") for item in report.detectors),
        ("Certified for", "; ".join(guard.certified)),
        ("Served here in", report.serving),
        ("Signature", "present, not verified here" if guard.signed else "none"),
        ("Trained on", ", ".join(guard.sources) or "not recorded"),
        ("Report made", report.created),
    ]
    listed = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
    lines = "".join(f'<p class="summary">{escaped(line)}</p>' for line in report.summaries)
    return f'<header><p class="brand">Spider-Sense</p><h1>Guard report</h1>{lines}<dl>{listed}</dl></header>'


def _legend(scales: list[float]) -> str:
    full = f"±{scales[0]:.2g}" if len(scales) == 1 else "each detector's own scale"
    return (
        '<p class="legend"><span>lowers the score</span><span class="ramp"></span><span>raises it '
        f'({full} at full colour)</span><span class="t suspected">readout at or above suspect</span>'
        '<span class="t breached">readout at or above breach</span></p>'
    )


def _conversation(item: Conversation, scales: list[float]) -> str:
    tracks = [_track(item, index, scales[index]) for index in range(len(item.tracks))]
    more = "".join(
        f"<details><summary>Detector {escaped(track.detector)}: {track.zone}</summary>{body}</details>"
        for track, body in zip(item.tracks[1:], tracks[1:], strict=True)
    )
    label = f'<span class="label">labelled {escaped(item.label)}</span>' if item.label else ""
    missing = f'<p class="quiet">{item.missing} tokens were not seen.</p>' if item.missing else ""
    worst = max((track.zone for track in item.tracks), key=list(_MARKS).index)
    return (
        f'<article><h3><span class="badge {worst}"><span aria-hidden="true">{_MARKS[worst]}</span> {worst}</span> '
        f"{escaped(item.name)} {label}</h3>{missing}{tracks[0]}{more}</article>"
    )


def _track(item: Conversation, index: int, full: float) -> str:
    track = item.tracks[index]
    facts = [
        ("Peak", f"{track.peak:.3f}"),
        ("Suspect from", f"{track.suspect:.3f}"),
        ("Breach from", f"{track.breach:.3f}"),
        ("Default action", item.action),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
    return (
        f'<div class="track"><div>{heat_map(track, full)}'
        f'<p class="quiet">{item.skipped} template tokens before these are not scored.</p>'
        f'<h4>Strongest tokens</h4>{strongest(track)}<p class="quiet">{escaped(track.meaning)}.</p></div>'
        f'<aside><dl class="facts">{listed}</dl><figure>{time_chart(track)}</figure></aside></div>'
    )


def _detector(item: DetectorFacts) -> str:
    open_section = f'<section><p class="brand">Detector {escaped(item.name)}</p>'
    return (
        f"{open_section}<h2>What it catches, and what it flags wrongly</h2>{_measured(item)}</section>"
        f"{open_section}<h2>Which layer, which probe</h2>{_sweep(item)}</section>"
        f"{open_section}<h2>Thresholds</h2><p>Placed on {item.calibration.n} benign conversations of up to "
        f"{item.calibration.horizon_tokens} tokens. A pooled bucket had too few of its own.</p>"
        f"{thresholds_table(item.calibration)}</section>"
    )


def _measured(item: DetectorFacts) -> str:
    if not item.systems:
        return "<p>The manifest holds no test results.</p>"
    if any(system.roc for system in item.systems):
        figure = (
            f'<figure>{roc_chart(item)}<figcaption class="quiet">Shaded: rates finer than one benign test prompt, '
            "where nothing was measured.</figcaption></figure>"
        )
    else:
        figure = '<p class="quiet">The manifest keeps no curve; train the guard again to have one.</p>'
    gain = ""
    if item.gain is not None and item.gain.value is not None:
        points = [
            f"{100 * value:+.1f}" for value in (item.gain.value, item.gain.low, item.gain.high) if value is not None
        ]
        gain = f"<p>Gain over TF-IDF at 1% FPR: {points[0]} points ({' to '.join(points[1:])}).</p>"
    return (
        f"<p>{item.n} test prompts, {item.positives} of them positive. The controls saw the same training part.</p>"
        f'<div class="pair">{figure}<div>{systems_table(item)}{gain}</div></div>'
    )


def _sweep(item: DetectorFacts) -> str:
    if not item.candidates:
        return "<p>The manifest holds no sweep.</p>"
    drawn = {id(candidate) for points in by_layer(item.candidates).values() for _, candidate in points}
    others = [candidate for candidate in item.candidates if id(candidate) not in drawn]
    chart = f"<figure><h4>One site at a time</h4>{layer_chart(item.candidates)}</figure>" if drawn else ""
    bars = f"<div><h4>Other candidates, best first</h4>{candidate_bars(others)}</div>" if others else ""
    return (
        "<p>Candidates on the validation part, by positives caught at 1% false positives. "
        f'Chosen: {escaped(item.family)} at {escaped(", ".join(item.sites))}.</p><div class="pair">{chart}{bars}</div>'
    )


def _footer(report: Report) -> str:
    return (
        f"<footer><p>Streamed and whole-sequence readouts of the conversations above differ by at most "
        f"{report.difference:.1e} (relative to max(1, |readout|)).</p></footer>"
    )
