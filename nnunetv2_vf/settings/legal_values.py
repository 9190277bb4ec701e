"""One setting: declare its default and its legal values; parse, validate and describe a value."""

from __future__ import annotations

import math
from dataclasses import Field, field
from typing import Any

from nnunetv2_vf.errors import UserError


def setting(
    default: Any,
    description: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    can_change: bool = False,
) -> Any:
    """Declare a dataclass field that holds a setting.

    The default decides the type: a whole number, a number, a text (one of ``choices``), or a tuple of two numbers
    (a range).

    Args:
        low, high: smallest and largest legal number, also for both ends of a range.
        can_change: True if a resumed training may have another value than the training had before.
    """
    metadata = {"description": description, "low": low, "high": high, "choices": choices, "can_change": can_change}
    return field(default=default, metadata=metadata)


def parse_value(f: Field[Any], value: Any, name: str) -> Any:
    """Return ``value`` in the type of the field's default.

    Args:
        value: text from the environment, or a JSON value from a plans file.
        name: what the error message calls the setting, for example the environment variable.

    Raises:
        UserError: the value is not legal.
    """
    try:
        if f.metadata["choices"]:
            return _parse_choice(f, value)
        if isinstance(f.default, tuple):
            return _parse_range(f, value)
        return _parse_number(f, value, type(f.default))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"setting {name} = {value!r} is not legal; legal: {_describe_legal_values(f)}") from None


def format_value(value: Any) -> str:
    """Return a value in the notation of an environment variable."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _parse_choice(f: Field[Any], value: Any) -> str:
    if value not in f.metadata["choices"]:
        raise ValueError
    return str(value)


def _parse_range(f: Field[Any], value: Any) -> tuple[float, float]:
    low, high = value.split(",") if isinstance(value, str) else value
    default: Any = f.default
    number_type = type(default[0])
    ends = _parse_number(f, low, number_type), _parse_number(f, high, number_type)
    if ends[0] > ends[1]:
        raise ValueError
    return ends


def _parse_number(f: Field[Any], value: Any, number_type: type) -> float:
    number: float = number_type(value)
    # int() turns True and 1.5 into 1 without an error.
    if isinstance(value, bool) or (number_type is int and not isinstance(value, str) and number != value):
        raise ValueError
    if not math.isfinite(number) or not f.metadata["low"] <= number <= f.metadata["high"]:
        raise ValueError
    return number


def _describe_legal_values(f: Field[Any]) -> str:
    if f.metadata["choices"]:
        return " or ".join(f.metadata["choices"])
    default: Any = f.default
    is_range = isinstance(default, tuple)
    number_type = type(default[0] if is_range else default)
    noun = "whole number" if number_type is int else "number"
    low, high = f.metadata["low"], f.metadata["high"]
    bounds = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
    return f"two {noun}s low,high {bounds}" if is_range else f"a {noun} {bounds}"
