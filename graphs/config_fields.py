"""Checks of single values in a checkpoint's ``config.json``: each returns the value, or refuses it.

A refusal is a ``ModelError`` that names the field, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import ModelError
from .fields import is_int, is_number, show

MAX_LAYERS = 1024
MAX_COUNT = 1 << 24
"""No size of a decoder or an encoder comes near it; larger ones are damage, not models."""


def reject_value(field: str, found: Any, expected: str) -> NoReturn:
    """Raise the ``ModelError`` of a field that cannot be used."""
    raise ModelError(
        f"{field} is {show(found)}, expected {expected}. Correct the checkpoint's config.json."
    )


def count(field: str, value: Any, most: int = MAX_COUNT, least: int = 1) -> int:
    """Return ``value``, an integer within bounds."""
    if not is_int(value) or not least <= value <= most:
        reject_value(field, value, f"an integer from {least} to {most}")
    return value


def number(field: str, value: Any) -> float:
    """Return ``value``, a positive finite number."""
    if not is_number(value) or not 0 < value <= 1e18:
        reject_value(field, value, "a positive number")
    return float(value)


def flag(field: str, value: Any) -> bool:
    """Return ``value``, true or false."""
    if not isinstance(value, bool):
        reject_value(field, value, "true or false")
    return value


def word(field: str, value: Any, known: tuple[str, ...]) -> None:
    """Check that ``value`` is one of the known words."""
    if value not in known:
        reject_value(field, value, known[0] if len(known) == 1 else f"one of {', '.join(known)}")


def divides(field: str, value: int, other: str, total: int) -> None:
    """Check that ``value`` divides ``total``, the field ``other``."""
    if total % value:
        reject_value(field, value, f"a divisor of {other}={total}")


def side(field: str, value: Any) -> Any:
    """Return one side of a square that may be given as two."""
    if isinstance(value, list | tuple) and len(value) == 2:
        if value[0] != value[1]:
            reject_value(f"vision_config.{field}", value, "a square: one number")
        return value[0]
    return value


def mapping(field: str, value: Any) -> Mapping[str, Any]:
    """Return ``value``, an object with string keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        reject_value(field, value, "an object")
    return value
