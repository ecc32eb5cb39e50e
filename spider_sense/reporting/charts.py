"""The three line charts: score over time, ROC at low false-positive rates, and TPR by layer."""

from collections.abc import Mapping, Sequence

from spider_sense.reporting.figure import Figure, Scale, round_ticks
from spider_sense.reporting.report import DetectorFacts, SweepPoint, System, Track
from spider_sense.types import Site

__all__ = ["by_layer", "layer_chart", "roc_chart", "time_chart"]

LOWEST_FPR, HIGHEST_FPR = 1e-3, 1e-1
LABEL_GAP = 16.0


def time_chart(track: Track) -> str:
    """Draw the running readout from the end of the prompt on, with both thresholds."""
    prompt_end = max((token.position for token in track.tokens if not token.response), default=0)
    points = [
        (float(token.position - prompt_end), token.readout) for token in track.tokens if token.readout is not None
    ]
    if not points:
        return '<p class="quiet">The readout is not a number anywhere, which counts as a breach.</p>'
    values = [value for _, value in points] + [track.suspect, track.breach]
    margin = 0.15 * (max(values) - min(values)) or 1.0
    last = max(points[-1][0], 1.0)
    figure = Figure(
        title=f"{track.detector}: running readout over {last:.0f} response tokens",
        x=Scale(low=0, high=last, start=46, stop=404),
        y=Scale(low=min(values) - margin, high=max(values) + margin, start=196, stop=26),
        width=416,
        height=240,
    )
    ticks = [tick for tick in round_ticks(0, last, 6) if tick == int(tick)]
    xs = [(tick, "prompt end" if tick == 0 else f"{tick:.0f}") for tick in ticks]
    ys = [(tick, f"{tick:g}") for tick in round_ticks(figure.y.low, figure.y.high, 4)]
    figure.grid(xs, ys, "response token", "readout")
    figure.path(points, "readout")
    close = abs(figure.y(track.breach) - figure.y(track.suspect)) < 2 * LABEL_GAP
    for name, value in (("suspect", track.suspect), ("breach", track.breach)):
        # Labels of two close lines go to their outer sides; otherwise a label keeps clear of the readout.
        below = name == "suspect" if close else _crowded(figure, points, value)
        figure.rule(value, f"{name} {value:.2f}", name, below)
    when, top = max(points, key=lambda point: point[1])
    figure.dot(when, top, "readout", f"peak {top:.3f} after {when:.0f} response tokens")
    return figure.svg()


def _crowded(figure: Figure, points: Sequence[tuple[float, float]], value: float) -> bool:
    """Return whether the readout runs where a label above the right end of a line would stand."""
    late = [figure.y(readout) for when, readout in points if when >= 0.7 * figure.x.high]
    return any(figure.y(value) - 2 * LABEL_GAP < pixel <= figure.y(value) for pixel in late)


def roc_chart(detector: DetectorFacts) -> str:
    """Draw the curves of the guard and its controls, false positives on a logarithmic axis."""
    figure = Figure(
        title=f"{detector.name}: true-positive rate over false-positive rate from 0.1% to 10%",
        x=Scale(low=LOWEST_FPR, high=HIGHEST_FPR, start=46, stop=352, log=True),
        y=Scale(low=0, high=1, start=250, stop=26),
    )
    xs = [(0.001, "0.1%"), (0.003, "0.3%"), (0.01, "1%"), (0.03, "3%"), (0.1, "10%")]
    ys = [(share / 4, f"{25 * share}%") for share in range(5)]
    negatives = detector.n - detector.positives
    if negatives:
        figure.band(LOWEST_FPR, 1 / negatives, "void")
    figure.grid(xs, ys, "benign flagged (false-positive rate)", "positives caught")
    figure.upright(0.01, "marker")
    curves = {system.name: _steps(system) for system in detector.systems if system.roc}
    # The guard is drawn last, over the others.
    for name, points in reversed(curves.items()):
        figure.path(points, f"s-{name}")
    ends = {name: figure.y(points[-1][1]) for name, points in curves.items()}
    titles = {system.name: system.title for system in detector.systems}
    for name, y in _apart(ends, 30.0, 250.0).items():
        figure.text(360, y + 4, titles[name], f"series t-{name}")
    return figure.svg()


def layer_chart(candidates: Sequence[SweepPoint]) -> str:
    """Draw the families that were tried at several layers: TPR over the layer, one line a family and place."""
    lines = by_layer(candidates)
    layers = sorted({layer for points in lines.values() for layer, _ in points})
    if not layers:
        return ""
    figure = Figure(
        title="True-positive rate at 1% false positives by layer, one line a family",
        x=Scale(low=layers[0] - 0.5, high=layers[-1] + 0.5, start=46, stop=380),
        y=Scale(low=0, high=_ceiling(lines), start=250, stop=26),
    )
    ys = [(tick, f"{100 * tick:g}%") for tick in round_ticks(0, figure.y.high, 5)]
    figure.grid([(layer, f"{layer}") for layer in layers], ys, "layer", "caught at 1% FPR")
    places = _apart({name: figure.y(points[-1][1].tpr) for name, points in lines.items()}, 30.0, 250.0)
    for index, (name, points) in enumerate(lines.items()):
        figure.path([(layer, candidate.tpr) for layer, candidate in points], f"f-{index % 8}")
        for layer, candidate in points:
            tip = f"{name}, layer {layer}: {candidate.tpr:.1%}{', chosen' if candidate.chosen else ''}"
            figure.dot(layer, candidate.tpr, f"f-{index % 8}{' chosen' if candidate.chosen else ''}", tip)
        figure.text(388, places[name] + 4, name, f"series k-{index % 8}")
    return figure.svg()


def by_layer(candidates: Sequence[SweepPoint]) -> dict[str, list[tuple[int, SweepPoint]]]:
    """Return (layer, candidate) of every family and place that was tried alone at several layers, by layer."""
    single = [(candidate, Site.parse(candidate.sites[0])) for candidate in candidates if len(candidate.sites) == 1]
    places = {site.place for _, site in single}
    lines: dict[str, list[tuple[int, SweepPoint]]] = {}
    for candidate, site in sorted(single, key=lambda item: item[1]):
        name = candidate.family if len(places) == 1 else f"{candidate.family} {site.place}"
        lines.setdefault(name.replace("_", " "), []).append((site.layer, candidate))
    return {name: points for name, points in lines.items() if len(points) > 1}


def _steps(system: System) -> list[tuple[float, float]]:
    """Return the curve as steps: a rate of caught positives is reached at its point, not on the way to it."""
    before = [tpr for fpr, tpr in system.roc if fpr <= LOWEST_FPR]
    points = [(LOWEST_FPR, max(before, default=0.0))]
    for fpr, tpr in system.roc:
        if LOWEST_FPR < fpr <= HIGHEST_FPR:
            points += [(fpr, points[-1][1]), (fpr, tpr)]
    return [*points, (HIGHEST_FPR, points[-1][1])]


def _ceiling(lines: Mapping[str, Sequence[tuple[int, SweepPoint]]]) -> float:
    highest = max(candidate.tpr for points in lines.values() for _, candidate in points)
    return next(top for top in (0.1, 0.25, 0.5, 0.75, 1.0) if highest <= top)


def _apart(places: Mapping[str, float], top: float, bottom: float) -> dict[str, float]:
    """Move labels apart so that none covers another, within the height of the figure where they fit."""
    order = sorted(places, key=lambda name: places[name])
    result: dict[str, float] = {}
    floor = top
    for name in order:
        result[name] = floor = max(places[name], floor)
        floor += LABEL_GAP
    ceiling = bottom
    for name in reversed(order):
        result[name] = min(result[name], ceiling)
        ceiling = result[name] - LABEL_GAP
    return result
