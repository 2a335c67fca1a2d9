"""Caches of keys and values: their names among a stage's inputs, their types and sizes."""

from __future__ import annotations

from collections.abc import Sequence

from .parts import StagePart, probed, whole_stages
from .plan.plan import StagePlan
from .quantization import CacheScheme

SLOT_STEP = 64
"""Fixed numbers of slots are multiples of this."""


def stage_slots(plan: StagePlan, visual_tokens: int, context: int) -> list[int]:
    """Return the slots that each stage needs for ``context`` rows of unpruned prompt and answer.

    Rows that a stage never sees need no slot: with one image a stage that keeps K of N visual
    tokens is N - K slots shorter. Rounded up to ``SLOT_STEP``.
    """
    needed = [context - visual_tokens + stage.visual_tokens for stage in plan.stages]
    return [-(-slots // SLOT_STEP) * SLOT_STEP for slots in needed]


def cache_names(layers: Sequence[int]) -> list[tuple[str, str]]:
    """Return the (key, value) input names of each of the layers, which all attend."""
    return [(f"key.{layer}", f"value.{layer}") for layer in layers]


def scored_layer(plan: StagePlan, edge: int) -> int:
    """Return the layer whose attention a select edge reads: the last before it that attends, or the
    next.
    """
    before = plan.stages[edge]
    ahead = plan.edges[edge].selector.next_layer
    return before.layers[1] if ahead else before.attention_layers[-1]


def ahead_of(plan: StagePlan, stage: int) -> int | None:
    """Return the layer whose queries and keys ``stage`` computes beside its own, for its edge."""
    ahead = probed(plan, stage) and plan.edges[stage].selector.next_layer
    return scored_layer(plan, stage) if ahead else None


def ahead_name(layer: int) -> str:
    """Return the name of the cache of keys of a layer that the stage before it fills."""
    return f"ahead.{layer}"


def is_cache(name: str) -> bool:
    """Return whether a stage's input of this name is a cache."""
    return name.startswith(("key.", "value.", "ahead."))


def part_caches(plan: StagePlan, part: StagePart) -> list[str]:
    """Return the input names of all caches of (part of) a stage, in their order."""
    names = [name for pair in cache_names(part.attention_layers(plan)) for name in pair]
    ahead = ahead_of(plan, part.stage) if part.ends(plan) else None
    return names if ahead is None else [*names, ahead_name(ahead)]


def stage_caches(plan: StagePlan) -> list[list[str]]:
    """Return the input names of all caches, by stage."""
    return [part_caches(plan, part) for part in whole_stages(plan)]


def select_caches(plan: StagePlan, edge: int) -> dict[str, str]:
    """Return the caches that a selection reads, by the names that its graph has for them."""
    layer = scored_layer(plan, edge)
    if ahead_of(plan, edge) is not None:
        return {"key": ahead_name(layer)}
    return {"key": f"key.{layer}", "value": f"value.{layer}"}


def appended(name: str) -> str:
    """Return the output name of a cache, or of its new rows where these are returned."""
    return f"{name}.out"


def cache_dtype(dtype: str, cache: CacheScheme) -> str:
    """Return the type of cached keys and values in graphs whose floats are of type ``dtype``."""
    return "int8" if cache == "int8" else dtype
