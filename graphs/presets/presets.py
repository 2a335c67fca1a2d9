"""Named plans for a decoder of any depth: ``preset("visipruner", 32, 576, t=14, keep=32)``.

It knows methods, not models: without options every number follows from the depth and the count of
visual tokens, and the plan says that it is uncalibrated.

Source: docs/design.md, "The plan".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import PlanError, nearest
from ..plan.plan import StagePlan
from . import probing_presets
from . import static as static_presets
from .request import Preset, Request

PRESETS: dict[str, Preset] = {
    "dense": static_presets.DENSE,
    "visipruner": static_presets.VISIPRUNER,
    "visipruner-code": probing_presets.CODE,
    "visipruner-paper": probing_presets.PAPER,
    "visipruner-adaptive": probing_presets.ADAPTIVE,
    "fastv": static_presets.FASTV,
    "pyramiddrop": static_presets.PYRAMIDDROP,
    "exit-only": static_presets.EXIT_ONLY,
}

LATER = ("hidrop", "vica", "embedlens")


def preset(name: str, layers: int, visual_tokens: int, **options: Any) -> StagePlan:
    """The plan of preset ``name`` for a decoder of ``layers`` layers and N ``visual_tokens``.

    The plan is called after the preset and the options given, so that two settings never share a
    directory: ``visipruner-t14-keep32``. Options: ``PRESETS[name].options``.

    Raises:
        PlanError: an unknown preset or option, or values that contradict each other.
    """
    if name not in PRESETS:
        if name in LATER:
            hint = f" {name} is planned, but not supported yet."
        else:
            hint = nearest(name, tuple(PRESETS))
        raise PlanError(f"preset: found {name!r}, expected one of {', '.join(PRESETS)}.{hint}")
    chosen = PRESETS[name]
    known = tuple(chosen.options)
    for option in options:
        if option not in known:
            hint = f"one of {', '.join(known)}.{nearest(option, known)}" if known else "no options."
            raise PlanError(f"{name}: found option {option!r}, expected {hint}")
    for field, value in (("layers", layers), ("visual_tokens", visual_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(
                f"{name}: found {field}={value!r}, expected a positive integer. "
                "Take it from the model's config.json."
            )
    return chosen.build(Request(name, chosen.options, layers, visual_tokens, options))


def options_from_strings(name: str, items: Iterable[str]) -> dict[str, Any]:
    """Options of preset ``name`` from ``["t=14", "keep=32"]``, with the types it expects.

    Raises:
        PlanError: an item that is no ``key=value``, a repeated key, or a value of another type.
            Unknown keys are left to ``preset``.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise PlanError(
                f"{name}: found option {item[:60]!r}, expected key=value, such as t=14."
            )
        if key in options:
            raise PlanError(f"{name}: found option {key!r} twice, expected it once. Remove one.")
        options[key] = _parse(name, key, value)
    return options


_WORDS = ("norm", "template", "exit_rule")
_SWITCHES = ("middle", "deep")
_LISTS = ("boundaries", "buckets")
_NUMBERS = ("r", "ratio", "cosine", "contribution", "exit_cosine")


def _parse(name: str, key: str, value: str) -> Any:
    if name not in PRESETS or key not in PRESETS[name].options or key in _WORDS:
        return value  # ``preset`` judges it
    if key in _SWITCHES and value.lower() in ("true", "yes", "on"):
        return True
    if key in ("shallow", *_SWITCHES) and value.lower() in ("false", "no", "off", "none"):
        return False
    try:
        if key in _LISTS:
            return tuple(int(item) for item in value.split("-"))
        return float(value) if key in _NUMBERS else int(value)
    except ValueError:
        kind = "a number" if key in _NUMBERS else "an integer"
        kind = "integers such as 8-16-32" if key in _LISTS else kind
        kind = "true or false" if key in _SWITCHES else kind
        raise PlanError(f"{name}: found {key}={value[:40]}, expected {kind}.") from None
