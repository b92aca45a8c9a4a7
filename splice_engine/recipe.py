"""What a set of numbers is made of: fields with help and limits, which are checked when one is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from .errors import SpliceError


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    choices: tuple[int, ...] = (),
) -> Any:
    """A field with what every face of it needs: help, limits, the step in which a widget counts, the only values."""
    metadata = {"help": help, "low": low, "high": high, "step": step, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """A set of numbers, each with help and limits; types and limits are checked when one is made.

    Raises:
        SpliceError: A value of the wrong type, or out of its limits.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), hints[item.name], item.metadata)


def _check(name: str, value: object, hint: Any, metadata: Mapping[str, Any]) -> None:
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return
    if isinstance(value, bool) or bool in allowed:
        if not (isinstance(value, bool) and bool in allowed):
            raise SpliceError(f"{name} must be {_kind(allowed)}, not {value!r}")
        return
    if not isinstance(value, int | float) or (float not in allowed and not isinstance(value, int)):
        raise SpliceError(f"{name} must be {_kind(allowed)}, not {value!r}")
    low, high = metadata["low"], metadata["high"]
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise SpliceError(f"{name} must be {limits}, not {value}")
    choices = metadata["choices"]
    if choices and value not in choices:
        raise SpliceError(f"{name} must be one of {', '.join(map(str, choices))}, not {value}")


def _kind(allowed: tuple[Any, ...]) -> str:
    return "true or false" if bool in allowed else "a number" if float in allowed else "a whole number"
