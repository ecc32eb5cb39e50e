"""What tells two models of one architecture apart: rows of projections, and everything else.

Shape letters: F rows of a projection, D its inputs.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from nest.activations import projection_sites
from spider_sense.errors import MismatchError
from spider_sense.experts import resolve_expert
from spider_sense.fingerprint import fingerprint
from spider_sense.folders import Record
from spider_sense.models import LoadedModel
from spider_sense.patching import projection_FD
from spider_sense.sites import resolve
from spider_sense.types import Site

__all__ = ["ModelDiff", "ProjectionDiff", "diff_models"]


class ProjectionDiff(Record):
    """Two models at one projection."""

    site: str
    rows: tuple[int, ...]
    """Those that differ in at least one number."""
    of: int
    """How many rows there are."""
    norm: float
    """Frobenius norm of the difference."""


class ModelDiff(Record):
    """Two models of one architecture."""

    a: str
    """What it was loaded by."""
    b: str
    dtype_a: str
    dtype_b: str
    projections: tuple[ProjectionDiff, ...]
    """Gate and up projections that differ."""
    others: tuple[str, ...]
    """Everything else that differs: names of tensors, ``tokenizer``, ``chat template``."""


def diff_models(a: LoadedModel, b: LoadedModel) -> ModelDiff:
    """Compare two models' weights number by number, and their tokenizers by what they do.

    Weights of different dtypes are compared as float32.

    Raises:
        MismatchError: if the models have different architectures or shapes; with both values.
        PatchError: if a gate or up projection is quantised.
        SiteError: if the architecture is not supported.
    """
    _check_comparable(a, b)
    sites = projection_sites(a.model)
    found = (_projection_diff(site, projection_FD(a.model, site), projection_FD(b.model, site)) for site in sites)
    return ModelDiff(
        a=a.source,
        b=b.source,
        dtype_a=str(a.model.dtype).removeprefix("torch."),
        dtype_b=str(b.model.dtype).removeprefix("torch."),
        projections=tuple(diff for diff in found if diff.rows),
        others=tuple(_others(a, b, {_weight_name(a.model, site) for site in sites})),
    )


def _check_comparable(a: LoadedModel, b: LoadedModel) -> None:
    one, other = _shapes(a), _shapes(b)
    name = next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)
    if name is not None:
        raise MismatchError(
            f"{name} is {one.get(name, 'not there')} in {a.source} and {other.get(name, 'not there')} in {b.source}; "
            "compare two models of one architecture"
        )


def _shapes(loaded: LoadedModel) -> dict[str, str]:
    shapes = {name: str(list(value.shape)) for name, value in _tensors(loaded).items()}
    return {"the architecture": type(loaded.model).__name__, **shapes}


def _tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: value for name, value in loaded.model.state_dict().items() if isinstance(value, Tensor)}


def _weight_name(model: nn.Module, site: Site) -> str:
    if site.expert is not None:
        return f"{resolve_expert(model, site).path}.gate_up_proj"
    return f"{resolve(model, site).path}.weight"


def _projection_diff(site: Site, a_FD: Tensor, b_FD: Tensor) -> ProjectionDiff:
    difference_FD = a_FD.float() - b_FD.float()
    rows = (difference_FD != 0).any(1).nonzero().flatten().tolist()
    return ProjectionDiff(site=str(site), rows=tuple(rows), of=len(a_FD), norm=float(difference_FD.norm()))


def _others(a: LoadedModel, b: LoadedModel, compared: set[str]) -> Iterator[str]:
    other = _tensors(b)
    for name, value in _tensors(a).items():
        # Unequal dtypes are promoted before they are compared.
        if name not in compared and (value != other[name]).any():
            yield name
    one_print, other_print = fingerprint(a), fingerprint(b)
    if one_print.tokenizer_digest != other_print.tokenizer_digest:
        yield "tokenizer"
    if one_print.chat_template_digest != other_print.chat_template_digest:
        yield "chat template"
