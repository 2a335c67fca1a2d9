"""One field of a plan: of which kind it is, and how it is refused when it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import PlanError, nearest


def reject_field(field: str, found: Any, expected: str, fix: str) -> NoReturn:
    """Raise the ``PlanError`` that says what ``field`` holds, and what to write instead."""
    raise PlanError(f"{field}: found {_show(found)}, expected {expected}. {fix}")


class Words(str):
    """A finding in our own words; everything else is quoted, as it may hold terminal escapes."""


def _show(value: Any) -> str:
    try:
        text = str(value) if isinstance(value, Words) else repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def check_word(field: str, word: Any, known: tuple[str, ...], later: tuple[str, ...] = ()) -> None:
    """Refuse a word that is not among the ``known``; those for ``later`` are named as such."""
    if word in known:
        return
    listing = f"one of {', '.join(known)}"
    if word == "absent":
        reject_field(field, word, listing, "Absent vision is a stage with visual_tokens: 0.")
    if word in later:
        reject_field(field, word, listing, f"{word} is planned, but not supported yet.")
    hint = nearest(word, known) if isinstance(word, str) else ""
    reject_field(field, word, listing, hint.strip() or "Write one of them.")


def is_int(value: Any) -> bool:
    """Whether it is an integer, and one that a tensor of INT32 can hold."""
    # Positions and orders are int32 tensors, so nothing that counts tokens may exceed them.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def is_tuple_of(value: Any, kind: type) -> bool:
    """Whether it is a tuple of nothing but ``kind``."""
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def list_of(value: Any, field: str) -> list:
    """``value``, which must be a list."""
    if not isinstance(value, list):
        reject_field(field, value, "a list", "Write it as [a, b].")
    return value


def fields_of(
    data: Any, at: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Any]:
    """``data`` as a dict with known keys only and the required ones present."""
    if not isinstance(data, Mapping):
        reject_field(at, data, "a mapping", f"Its keys are {', '.join(required + optional)}.")
    prefix = "" if at == "plan" else f"{at}."
    for key in data:
        if key not in required + optional:
            hint = nearest(str(key), required + optional) if isinstance(key, str) else ""
            keys = f"one of {', '.join(required + optional)}"
            plain = isinstance(key, str) and key.isprintable() and len(key) <= 80
            field = f"{prefix}{key if plain else _show(key)}"
            reject_field(field, Words("an unknown key"), keys, hint.strip() or "Remove it.")
    for key in required:
        if key not in data:
            reject_field(f"{prefix}{key}", Words("nothing"), "a value", f"Add {key}: to the plan.")
    return dict(data)
