"""Ranges in the order in which people read them: by kind of input, then by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...compile.quantize.group_ranges import GroupRanges
from ...graphs.linears import HEAD
from ...graphs.plan.plan import StagePlan

_IN_A_LAYER = re.compile(r"(model|vision_tower)\.(?:.*\.)?layers\.(\d+)\.(.+)")

INPUT_KINDS = {
    "model": {
        "self_attn.q_proj": "attention (q, k, v)",
        "self_attn.o_proj": "attention output (o)",
        "mlp.gate_proj": "MLP (gate, up)",
        "mlp.down_proj": "MLP output (down)",
    },
    "vision_tower": {
        "self_attn.q_proj": "tower: attention (q, k, v)",
        "self_attn.out_proj": "tower: attention output",
        "mlp.fc1": "tower: MLP (fc1)",
        "mlp.fc2": "tower: MLP output (fc2)",
    },
}
"""What reads an input, by the name of its group's first linear layer."""

ELSEWHERE = "projector and head"


@dataclass(frozen=True)
class RangeSeries:
    """The groups of one kind, by layer; those outside layers are numbered in their order."""

    title: str
    decoder: bool
    layers: tuple[int, ...]
    names: tuple[str, ...]
    groups: tuple[GroupRanges, ...]


def series_of(groups: Mapping[str, GroupRanges]) -> list[RangeSeries]:
    """Every group once: the decoder's kinds, the tower's, and what is outside layers."""
    found: dict[str, list[tuple[int, str]]] = {
        kind: [] for part in INPUT_KINDS.values() for kind in part.values()
    }
    decoder = set(INPUT_KINDS["model"].values())
    for name in groups:
        match = _IN_A_LAYER.fullmatch(name)
        kind = INPUT_KINDS[match[1]].get(match[3], match[3]) if match else ELSEWHERE
        known = found.setdefault(kind, [])
        known.append((int(match[2]) if match else len(known), name))
        if match and match[1] == "model":
            decoder.add(kind)
    return [
        RangeSeries(
            kind,
            kind in decoder,
            tuple(layer for layer, _ in listed),
            tuple(name for _, name in listed),
            tuple(groups[name] for _, name in listed),
        )
        for kind, listed in found.items()
        if listed
    ]


@dataclass(frozen=True)
class RowsSeen:
    """How many rows the groups of one part of the model rest on: (fewest, most).

    rows: seen; used: by the smoothed thresholds. stage: its number, None outside the decoder.
    """

    part: str
    visual_tokens: int | None
    rows: tuple[int, int]
    used: tuple[int, int]
    stage: int | None = None


def rows_seen(groups: Mapping[str, GroupRanges], plan: StagePlan) -> list[RowsSeen]:
    """By stage of the decoder, then the rest of the model."""
    parts: dict[tuple[str, int | None, int | None], list[GroupRanges]] = {}
    for one in series_of(groups):
        for layer, name, group in zip(one.layers, one.names, one.groups, strict=True):
            key: tuple[str, int | None, int | None] = ("tower and projector", None, None)
            if one.decoder:
                index = next(i for i, s in enumerate(plan.stages) if layer < s.layers[1])
                first, stop = plan.stages[index].layers
                layers = f"layer {first}" if stop == first + 1 else f"layers {first}–{stop - 1}"
                key = (f"stage {index}, {layers}", plan.stages[index].visual_tokens, index)
            elif name == HEAD:
                key = ("head", None, None)
            parts.setdefault(key, []).append(group)
    listed = [
        RowsSeen(
            part,
            visual,
            (min(one.rows for one in those), max(one.rows for one in those)),
            (min(one.rows_used for one in those), max(one.rows_used for one in those)),
            stage,
        )
        for (part, visual, stage), those in parts.items()
    ]
    return sorted(listed, key=lambda one: math.inf if one.stage is None else one.stage)


def by_sensitivity(groups: Mapping[str, GroupRanges]) -> list[tuple[str, float]]:
    """(linear layer, relative squared output error in INT8), the worst first.

    Precision ``int8`` rounds weights alone in the head, and weights and inputs elsewhere; it is in
    this order that ``keep=5%`` leaves layers in float.
    """
    found = [
        (name, errors["w8" if name == HEAD else "w8a8"])
        for group in groups.values()
        for name, errors in group.sensitivity.items()
    ]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def kept_float(groups: Mapping[str, GroupRanges], share: float = 0.05) -> list[tuple[str, float]]:
    """What ``keep=5%`` would leave in float: the first of ``by_sensitivity``."""
    ranked = by_sensitivity(groups)
    return ranked[: math.ceil(share * len(ranked))]
