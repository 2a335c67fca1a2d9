"""Named plans for a decoder of any depth: ``preset("visipruner", 32, 576, t=14, keep=32)``.

It knows methods, not models: without options every number follows from the depth and the count of
visual tokens, and the plan says that it is uncalibrated. A new preset is a subclass of ``Preset``,
in a file of its own, and an entry of ``PRESETS``.

Source: docs/design.md, "The plan".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ..errors import PlanError, nearest
from ..fields import from_json, split_options
from ..plan.checks import is_count
from ..plan.plan import StagePlan
from .embedlens import EmbedLens
from .entering import entering_presets
from .hidrop import HiDrop
from .narrowing import SparseVLM, Tops, V2Drop
from .per_prompt import VisiPrunerAdaptive, VisiPrunerCode, VisiPrunerPaper
from .request import Layer, Preset, Request, as_word
from .routed import Dllm, Mod, SkipGpt, SkipGptLrm
from .static import Dense, Depth, ExitOnly, FastV, PyramidDrop, VisiPruner
from .vica import ViCA

_ALL: tuple[type[Preset], ...] = (
    Dense,
    VisiPruner,
    VisiPrunerCode,
    VisiPrunerPaper,
    VisiPrunerAdaptive,
    FastV,
    PyramidDrop,
    SparseVLM,
    V2Drop,
    Tops,
    HiDrop,
    ViCA,
    ExitOnly,
    SkipGpt,
    SkipGptLrm,
    Dllm,
    Mod,
    EmbedLens,
    Depth,
    *entering_presets(),
)

PRESETS = {preset.name: preset for preset in _ALL}

_REMEDY = "Write options such as t=14, cosine=0.99, deep=false or boundaries=8-16-32."


def preset(
    name: str, layers: Any = None, visual_tokens: Any = None, /, **options: Any
) -> StagePlan:
    """Return the plan of preset ``name`` for ``layers`` layers and N ``visual_tokens``.

    Both may also be given by these names, by which a preset may have an option, too. The plan is
    called after the preset and the options given, so that two settings never share a directory:
    ``visipruner-t14-keep32``. Options: ``PRESETS[name].options()``.

    Raises:
        PlanError: an unknown preset or option, or values that contradict each other.
    """
    if name not in PRESETS:
        hint = nearest(name, tuple(PRESETS))
        raise PlanError(f"preset: found {name!r}, expected one of {', '.join(PRESETS)}.{hint}")
    if layers is None:
        layers = options.pop("layers", None)
    if visual_tokens is None:
        visual_tokens = options.pop("visual_tokens", None)
    for field, value in (("layers", layers), ("visual_tokens", visual_tokens)):
        if not is_count(value):
            raise PlanError(
                f"{name}: found {field}={value!r}, expected a positive integer. "
                "Take it from the model's config.json."
            )
    chosen = from_json(PRESETS[name], options, PlanError, _REMEDY, name, defaults=True)
    return chosen.build(Request(chosen, layers, visual_tokens))


def parse_request(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of ``visipruner:t=14,keep=32``, as ``preset`` takes them.

    What does not look like a value of the option stays text, for ``preset`` to refuse.

    Raises:
        PlanError: an item that is no ``key=value``, or a repeated key.
    """
    name, pairs = split_options(text, PlanError, _REMEDY)
    kinds = get_type_hints(PRESETS[name]) if name in PRESETS else {}
    return name, {key: _parse(kinds.get(key), value) for key, value in pairs}


def request_text(name: str, options: Mapping[str, Any]) -> str:
    """Return what ``parse_request`` reads as this preset with these options."""
    words = ",".join(f"{key}={as_word(value)}" for key, value in options.items())
    return f"{name}:{words}" if words else name


def _parse(kind: Any, text: str) -> Any:
    if kind is bool and text.lower() in ("true", "yes", "on"):
        return True
    if kind in (bool, Layer) and text.lower() in ("false", "no", "off", "none"):
        return False
    try:
        if tuple[int, ...] in (kind, *get_args(kind)):
            return tuple(int(item) for item in text.split("-"))
        if kind == tuple[float, ...]:
            return tuple(float(item) for item in text.split("-"))
        if kind is float:
            return float(text)
        return int(text) if kind in (int, Layer) else text
    except ValueError:
        return text
