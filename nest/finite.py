"""What a model computes must be numbers: of what is not, the largest is the first token, and every refusal is gone."""

from torch import Tensor

from spider_sense.errors import DataError

__all__ = ["check_finite"]


def check_finite(values: Tensor, what: str) -> None:
    """Check what a model computed before anything is concluded from it.

    Args:
        values: of any shape.
        what: what they are, for the message.

    Raises:
        DataError: if one is infinite or not a number.
    """
    if not bool(values.isfinite().all()):
        raise DataError(
            f"{what} are not all finite, so nothing can be measured on this model; load it in float32, or look for "
            "weights that are not numbers"
        )
