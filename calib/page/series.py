"""Ranges in reading order: by kind of input, then by layer; and by what rounding costs."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ...compile.quantize.group_ranges import GroupRanges
from ...graphs.linears import HEAD
from ...graphs.plan.plan import StagePlan

_IN_A_LAYER = re.compile(r"(.*\.)?layers\.(\d+)\.(.+)")
_DECODER = "model."

ELSEWHERE = "projector and head"

Entry = tuple[int, str, GroupRanges]

KEPT_SHARE = 0.05
"""The share of linear layers that the page shows as kept in float: ``keep=5%``."""


@dataclass(frozen=True)
class RangeSeries:
    """The groups of one kind: (layer, name, ranges); those outside layers are numbered in order."""

    title: str
    decoder: bool
    entries: tuple[Entry, ...]

    @property
    def groups(self) -> tuple[GroupRanges, ...]:
        """Ranges by layer."""
        return tuple(group for _, _, group in self.entries)

    @property
    def layers(self) -> int:
        """Layers up to the last one of the series."""
        return 1 + max(layer for layer, _, _ in self.entries)


def series_of(groups: Mapping[str, GroupRanges]) -> list[RangeSeries]:
    """Return every group once: the decoder's kinds, the vision encoder's, those outside layers."""
    decoder: dict[str, list[Entry]] = defaultdict(list)
    encoder: dict[str, list[Entry]] = defaultdict(list)
    elsewhere: list[Entry] = []
    for name, group in groups.items():
        match = _IN_A_LAYER.fullmatch(name)
        if match is None:
            elsewhere.append((len(elsewhere), name, group))
            continue
        block = match[3].rpartition(".")[0]
        linears = [linear.rpartition(".")[2] for linear in sorted(group.sensitivity)]
        title = f"{block}: {', '.join(linear.removesuffix('_proj') for linear in linears)}"
        kinds = decoder if match[1] == _DECODER else encoder
        kinds[title].append((int(match[2]), name, group))
    return [
        *(RangeSeries(title, True, tuple(found)) for title, found in decoder.items()),
        *(RangeSeries(f"encoder {title}", False, tuple(found)) for title, found in encoder.items()),
        *([RangeSeries(ELSEWHERE, False, tuple(elsewhere))] if elsewhere else []),
    ]


@dataclass(frozen=True)
class SeenRows:
    """The number of rows that the groups of one part of the model rest on: (fewest, most).

    rows: seen; used: by the smoothed thresholds. stage: its number, None outside the decoder.
    """

    part: str
    visual_tokens: int | None
    rows: tuple[int, int]
    used: tuple[int, int]
    stage: int | None = None


def rows_seen(groups: Mapping[str, GroupRanges], plan: StagePlan) -> list[SeenRows]:
    """Return the rows by stage of the decoder, then of the rest of the model."""
    parts: dict[tuple[str, int | None, int | None], list[GroupRanges]] = defaultdict(list)
    for series in series_of(groups):
        for layer, name, group in series.entries:
            key: tuple[str, int | None, int | None] = ("vision encoder and projector", None, None)
            if series.decoder:
                index = next(i for i, s in enumerate(plan.stages) if layer < s.layers[1])
                first, stop = plan.stages[index].layers
                layers = f"layer {first}" if stop == first + 1 else f"layers {first}–{stop - 1}"
                key = (f"stage {index}, {layers}", plan.stages[index].visual_tokens, index)
            elif name == HEAD:
                key = ("head", None, None)
            parts[key].append(group)

    def extent(counts: list[int]) -> tuple[int, int]:
        return min(counts), max(counts)

    listed = [
        SeenRows(
            part,
            visual,
            extent([group.rows for group in found]),
            extent([group.rows_used for group in found]),
            stage,
        )
        for (part, visual, stage), found in parts.items()
    ]
    return sorted(listed, key=lambda seen: math.inf if seen.stage is None else seen.stage)


def by_sensitivity(groups: Mapping[str, GroupRanges]) -> list[tuple[str, float]]:
    """Return (linear layer, relative squared output error in INT8), the worst first.

    Precision ``int8`` rounds weights alone in the head, and weights and inputs elsewhere; it is in
    this order that ``keep=5%`` leaves layers in float.
    """
    found = [
        (name, errors["w8" if name == HEAD else "w8a8"])
        for group in groups.values()
        for name, errors in group.sensitivity.items()
    ]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def kept_float(groups: Mapping[str, GroupRanges]) -> list[tuple[str, float]]:
    """Return what ``keep=5%`` would leave in float: the first of ``by_sensitivity``."""
    ranked = by_sensitivity(groups)
    return ranked[: math.ceil(KEPT_SHARE * len(ranked))]
