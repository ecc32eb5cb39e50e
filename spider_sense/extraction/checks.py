"""What can be refused of a log before a model reads it, which may take hours."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from spider_sense.errors import DataError, MissingExtraError
from spider_sense.extraction.artifact import Artifact
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import CHECKPOINTS, PROBES, SKETCH
from spider_sense.extraction.population import LEAST_HONEST
from spider_sense.extraction.rows import Row

__all__ = ["check_calibration", "check_fit", "check_installed", "check_widths"]


def check_fit(benign: Sequence[Row], campaigns: Sequence[Row], *, reads: bool) -> None:
    """Check that an extraction guard can be fitted on two logs.

    Args:
        benign: requests of honest principals.
        campaigns: requests of attackers.
        reads: whether a model reads the rows that have text.

    Raises:
        DataError: if a row has no family or no hidden state, or there are too few rows.
        MissingExtraError: if scikit-learn or scipy is not installed.
    """
    check_installed("train", "scikit-learn", "scipy")
    families = sorted({row.family for row in campaigns})
    if not families or "" in families:
        raise DataError("fitting needs campaigns, and a family in each of their rows: name what the campaign asks for")
    if len(families) >= PROBES:
        raise DataError(f"{len(families)} families: {', '.join(families)}; at most {PROBES - 1} are allowed: join some")
    both = [*benign, *campaigns]
    unread = sum(row.hidden is None and not (reads and row.prompt is not None) for row in both)
    if unread:
        raise DataError(
            f"{unread} of {len(both)} requests have no hidden state; a fit needs all of them: give 'hidden', or text "
            "and name a model that reads it with --model"
        )
    widths = sorted({len(row.hidden) for row in both if row.hidden is not None})
    if len(widths) > 1 or (widths and widths[0] < SKETCH):
        raise DataError(
            f"hidden states have {' and '.join(map(str, widths))} numbers; a fit needs those of one model and site, "
            f"at least {SKETCH} wide"
        )
    _check_lives(benign)


def _check_lives(benign: Sequence[Row]) -> None:
    lives, first = Counter(row.principal for row in benign), CHECKPOINTS[0]
    long = sum(count >= first for count in lives.values())
    if long < LEAST_HONEST:
        raise DataError(
            f"{long} of {len(lives)} honest principals sent {first} requests or more; a fit needs {LEAST_HONEST} that "
            "did: give a longer log, or more principals"
        )


def check_calibration(artifact: Artifact, benign: Sequence[Row], key: Key, *, reads: bool) -> None:
    """Check that thresholds can be set on a log.

    Args:
        artifact: what was fitted.
        benign: requests of honest principals.
        key: of the fit.
        reads: whether a model reads the rows that have text.

    Raises:
        DataError: if principals were fitted on, or have no activations at all: both would lower the thresholds of
            everybody.
        MissingExtraError: if scipy is not installed.
    """
    check_installed("train", "scipy")
    names = list(dict.fromkeys(row.principal for row in benign))
    known = [name for name in names if key.seed(name) in artifact.fitted]
    if known:
        raise DataError(
            f"{len(known)} of {len(names)} principals were fitted on, {known[0]!r} among them; they look tamer than "
            "those to come, and the thresholds would be too low: leave them out, or calibrate on another log"
        )
    seen = {row.principal for row in benign if reads or row.hidden is not None or row.sketch is not None}
    unseen = [name for name in names if name not in seen]
    if unseen:
        raise DataError(
            f"{len(unseen)} of {len(names)} honest principals have no activations, {unseen[0]!r} among them; give "
            "'hidden', or text and the model to read it with, or leave them out"
        )


def check_widths(rows: Sequence[Row], width: int, heads: int) -> None:
    """Check that activations have the lengths of a guard's.

    Args:
        rows: any.
        width: of the hidden state.
        heads: probes of the guard; a row with a sketch has the logits of all.

    Raises:
        DataError: naming the first that has another one.
    """
    for row in rows:
        hidden, sketch, probes = row.hidden, row.sketch, row.probes
        wrong = {
            f"{len(hidden or ())} hidden numbers, expected {width}": hidden is not None and len(hidden) != width,
            f"a sketch of {len(sketch or ())} numbers, expected {SKETCH}": sketch is not None and len(sketch) != SKETCH,
            f"{len(probes or ())} probes, expected {heads}": (sketch or probes) is not None
            and len(probes or ()) != heads,
        }
        found = next((words for words, is_wrong in wrong.items() if is_wrong), None)
        if found is not None:
            raise DataError(f"a request of {row.principal!r} has {found}; write the log with this guard's model")


def check_installed(extra: str, *packages: str) -> None:
    """Check that packages are there.

    Raises:
        MissingExtraError: naming the first that is not, and the extra that has it.
    """
    for package in packages:
        if find_spec({"scikit-learn": "sklearn"}.get(package, package)) is None:
            raise MissingExtraError(package, extra)
