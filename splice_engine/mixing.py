"""Weights of a mixture: read, checked, and scaled to shares."""

import math
import re
from collections.abc import Sequence

from .errors import SpliceError


def parse_weights(text: str) -> list[float]:
    """Reads weights such as "0.7, 0.3"; none of them is checked yet.

    Raises:
        SpliceError: Something between the commas is no number.
    """
    try:
        return [float(word) for word in re.split(r"[,;\s]+", text.strip(" ,;\t\n"))]
    except ValueError:
        raise SpliceError(f"weights must be numbers with commas between them, such as 0.7,0.3, not '{text}'") from None


def to_shares(weights: Sequence[float] | None, count: int, what: str = "appearance pictures") -> tuple[float, ...]:
    """Weights scaled to a sum of 1; None is equal shares.

    Args:
        weights: One for each part of a mixture; only their ratio counts.
        count: Parts that there are.
        what: Their name in error messages.

    Raises:
        SpliceError: Another number of weights, one below 0 or no number, or none above 0.
    """
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise SpliceError(f"give as many weights as {what}: {count}, not {len(weights)}")
    total = sum(weights)
    if not math.isfinite(total) or min(weights) < 0 or total <= 0:
        raise SpliceError("weights must be at least 0, and one of them above 0")
    return tuple(weight / total for weight in weights)
