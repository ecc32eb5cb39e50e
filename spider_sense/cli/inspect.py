"""``spider-sense inspect``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spider_sense.cli.app import app, console
from spider_sense.cli.plain import plain
from spider_sense.cli.tables import evidence_table, thresholds_table

if TYPE_CHECKING:
    from spider_sense.canary import Canaries
    from spider_sense.guard import Detector, Guard

__all__ = ["inspect"]

_TRAINING = {
    "parts": "parts",
    "sources": "sources",
    "test files": "test_sources",
    "calibrated anew on": "recalibrated_on",
}
"""What is shown of how the guard was trained, by its key in the manifest."""


@app.command()
def inspect(
    guard: Annotated[Path, typer.Argument(help="Guard folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Show what a guard is made of, what it was trained and calibrated on, and how good it is."""
    from spider_sense.guard import Guard
    from spider_sense.signing import is_signed

    read, signed = Guard.from_pretrained(guard), is_signed(guard)
    if as_json:
        typer.echo(json.dumps(_document(read, signed)))
        return
    console.print(_about(read, guard, signed))
    console.print(_detectors(read))
    for record in read.manifest.detectors:
        console.print(thresholds_table(record.name, record.calibration))
        _print_evidence(record)


def _document(guard: "Guard", signed: bool) -> dict[str, Any]:
    return {
        "digest": guard.digest,
        "signed": signed,
        "state_floats": _state_floats(guard),
        "vectors": {name: vector.numel() for name, vector in sorted(guard.vectors.items())},
        "manifest": guard.manifest.model_dump(mode="json"),
    }


def _about(guard: "Guard", folder: Path, signed: bool) -> Table:
    manifest, table = guard.manifest, Table(title=plain(f"Guard {folder}"), show_header=False)
    model = manifest.fingerprint
    rows = {
        "digest": guard.digest,
        "model": f"{model.base_model}: {model.architecture}, {model.layers} layers of width {model.width}",
        "weights": model.weight_digest,
        "certified for": "; ".join(map(_words, manifest.certified)),
        **{name: _words(manifest.training[key]) for name, key in _TRAINING.items() if key in manifest.training},
        "canaries": _canaries(manifest.canaries),
        "steering vectors": _words(sorted(guard.vectors)) or "none",
        "signature": "present; check it with `spider-sense verify`" if signed else "none",
    }
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, plain(value))
    return table


def _canaries(canaries: "Canaries | None") -> str:
    if canaries is None:
        return "none; `spider-sense calibrate --data` makes some, of a guard of whole requests"
    least, most = min(canaries.bands), max(canaries.bands)
    return f"{len(canaries.prompts)} prompts, an engine may differ by {least:.2g} to {most:.2g}"


def _detectors(guard: "Guard") -> Table:
    table, floats = (
        Table(title="Detectors", caption="state floats: remembered of each running request"),
        _state_floats(guard),
    )
    for name in ("detector", "family", "sites", "aggregator", "state floats"):
        table.add_column(name)
    for record in guard.manifest.detectors:
        aggregator = record.aggregator.model_dump(exclude_defaults=True)
        cells = (record.name, record.family, ", ".join(record.sites), _words(aggregator), str(floats[record.name]))
        table.add_row(*map(plain, cells))
    return table


def _print_evidence(record: "Detector") -> None:
    overall = record.evidence.get("overall")
    if overall is None:
        console.print(f"no test figures for {record.name}")
        return
    console.print(evidence_table(record.name, overall))
    if "warning" in overall:
        console.print(plain(overall["warning"], "yellow"))


def _state_floats(guard: "Guard") -> dict[str, int]:
    """Return the floats that each detector remembers of a running request."""
    return {probe.name: sum(lane.width for lane in probe.aggregator.lanes(head=0, column=0)) for probe in guard.probes}


def _words(value: Any) -> str:
    """Return nested records as one line without braces."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if item not in (None, [], ())}
        return ", ".join(f"{key} {_words(item)}" for key, item in shown.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
