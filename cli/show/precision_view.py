"""Quantised layers of a bundle: which they are, and the bytes of their weights."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ...graphs.bundle import Manifest
from ...graphs.fields import to_json
from ...graphs.linears import Group, linear_groups
from ...graphs.quantization import Scheme, block_of
from ...graphs.targets import find_target
from ...pages.units import show_bytes

MOST_NAMES = 6
"""Layers kept float that are named in the table."""

LAYERS = ("schemes", "decode")
"""Facts that every layer has: they are counted instead."""

VALUE_BITS = {"w8a8": 8, "w8": 8, "w4": 4}


def quantisation_facts(manifest: Manifest) -> dict[str, Any] | None:
    """Return what ``visistage inspect`` shows of quantisation, as JSON; None where all is float.

    ``places``: number of linear layers by scheme, for vision, each stage, the head, and the
    decoder's calls of one row where they have other weights;
    ``weight_bytes``: of linear layers, scales included, by scheme; ``float``: names of those that
    are float in a place where others are not.
    """
    quantization = manifest.quantization
    if not quantization.quantises:
        return None
    places: dict[str, Counter[str]] = {}
    nbytes: Counter[str] = Counter()
    kept: dict[str, list[str]] = {}
    groups = linear_groups(manifest.config, manifest.plan.dropped)
    for group in groups:
        place = _place(group, manifest)
        for name, outputs in zip(group.linears, group.outputs, strict=True):
            scheme = quantization.schemes.get(name, "float")
            places.setdefault(place, Counter())[scheme] += 1
            for own in dict.fromkeys((scheme, quantization.decode.get(name, scheme))):
                nbytes[own] += _bytes(own, (outputs, group.inputs), manifest)
            if scheme == "float":
                kept.setdefault(place, []).append(name)
    counted = {place: dict(counts) for place, counts in places.items()}
    if quantization.decode:
        decoder = (group for group in groups if group.place == "decoder")
        names = [name for group in decoder for name in group.linears]
        ways: Counter[str] = Counter(quantization.decode.get(name, "float") for name in names)
        counted["one row"] = dict(ways)
    mixed = [name for place, names in kept.items() if len(places[place]) > 1 for name in names]
    return {
        **{key: value for key, value in to_json(quantization).items() if key not in LAYERS},
        "places": counted,
        "float": mixed,
        "weight_bytes": dict(nbytes),
    }


def quantisation_rows(facts: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the same as names and values of table rows."""
    if facts is None:
        return []
    where = "; ".join(
        f"{place} {', '.join(f'{count} {scheme}' for scheme, count in counts.items())}"
        for place, counts in facts["places"].items()
    )
    sizes = ", ".join(f"{scheme} {show_bytes(n)}" for scheme, n in facts["weight_bytes"].items())
    strengths = facts["smoothed"].values()
    smoothed = ""
    if strengths:
        smoothed = f"{len(strengths)} groups, alpha {min(strengths):g} to {max(strengths):g}"
    return [
        ("linear layers", where),
        ("kept float", _some(facts["float"])),
        ("linear weights", sizes),
        ("inputs", f"ranges by {facts['observer']}" if facts["observer"] else "in float"),
        ("smoothed", smoothed),
        ("cache", "INT8, a scale for each layer and head" if facts["cache"] == "int8" else ""),
        ("calibration", (facts["calibration"] or "")[:12]),
    ]


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more (--json)" if more > 0 else "")


def _place(group: Group, manifest: Manifest) -> str:
    if group.place != "decoder":
        return group.place
    assert group.layer is not None
    return next(
        f"stage{index}"
        for index, stage in enumerate(manifest.plan.stages)
        if group.layer < stage.layers[1]
    )


def _bytes(scheme: Scheme, shape: tuple[int, ...], manifest: Manifest) -> int:
    """Count the bytes of a weight (N, K) in a scheme, and of its scales."""
    (outputs, inputs), element = shape, manifest.element_bytes
    if scheme == "float":
        return outputs * inputs * element
    block = block_of(scheme, inputs, engines=find_target(manifest.target).engines)
    scales = outputs * (1 if block is None else math.ceil(inputs / block))
    zeros = scales if scheme == "w8" and block is not None else 0  # a byte each
    scales += scheme == "w8a8"  # that of its inputs
    return math.ceil(outputs * inputs * VALUE_BITS[scheme] / 8) + scales * element + zeros
