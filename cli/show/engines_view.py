"""What was compiled from a bundle: size, shapes, layers, attention and caches of each engine."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ...graphs.bundle import Bundle
from ...graphs.contract import GraphSpec
from ...graphs.engine_index import EngineFact, Engines
from ...pages.units import show_bytes, show_seconds


def engine_facts(bundle: Bundle) -> dict[str, Any] | None:
    """What ``visistage inspect`` shows of the engines, as JSON; None where there are none."""
    engines = Engines.open(bundle)
    if engines is None:
        return None
    return {
        "backend": engines.backend,
        "version": engines.version,
        "gpus": engines.gpus(),
        "capabilities": [list(one) for one in engines.capabilities],
        "built_on": engines.built_on,
        "memory_bytes": _memory(bundle, engines),
        "engines": [
            {**asdict(one), "cache_bytes": _cache_bytes(bundle, one)} for one in engines.engines
        ],
    }


def engine_table(bundle: Bundle) -> RenderableType:
    """The same for people; nothing where there are none."""
    engines = Engines.open(bundle)
    if engines is None:
        return Group()
    table = Table("engine", "size", "rows", "slots", "caches", "attention", "layers", "compiled in")
    for column in table.columns[1:5]:
        column.justify = "right"
    for one in engines.engines:
        peak = f", peak {show_bytes(one.peak_bytes)}" if one.peak_bytes else ""
        cache = _cache_bytes(bundle, one)
        table.add_row(
            one.name,
            show_bytes(one.nbytes),
            "\n".join(_rows(profile) for profile in one.profiles if "rows" in profile),
            str(one.slots or ""),
            f"{show_bytes(cache)}\n{_in_place(one)}" if cache else "",
            _attention(one),
            escape(", ".join(f"{count} {kind}" for kind, count in _most(one.precisions))),
            f"{show_seconds(one.seconds)}{peak}",
        )
    needed = ", ".join(
        f"{show_bytes(nbytes)} for context {context}"
        for context, nbytes in _memory(bundle, engines).items()
    )
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    head.add_row("engines", f"{engines.backend} {engines.version}, for {engines.gpus()}")
    head.add_row("memory", f"{needed}: weights and caches, activations besides")
    return Group(head, table)


def _rows(profile: dict[str, list[list[int]]]) -> str:
    smallest, _, largest = profile["rows"]
    return f"{smallest[1]}-{largest[1]}"


def _in_place(one: EngineFact) -> str:
    return f"{one.caches_in_place} in place" if one.caches_in_place else "new rows handed back"


def _attention(one: EngineFact) -> str:
    if one.fused_attention or one.decomposable_attention:
        kinds = {"fused": one.fused_attention, "taken apart": one.decomposable_attention}
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return "basic layers"


def _most(counts: dict[str, int], shown: int = 3) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])[:shown]


def _cache_bytes(bundle: Bundle, one: EngineFact) -> int:
    """Bytes of the caches that an engine appends to; a selection only reads a stage's."""
    if not one.graph.startswith("stage"):
        return 0
    spec: GraphSpec = bundle.manifest.graphs[one.graph].spec
    sizes = {"B": 1, "S": one.slots}
    return sum(
        math.prod(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
        * np.dtype(tensor.dtype).itemsize
        for tensor in spec.inputs
        if tensor.name.startswith(("key.", "value."))
    )


def _memory(bundle: Bundle, engines: Engines) -> dict[int, int]:
    """Bytes that the engines for each context length need, caches included."""
    return {
        context: sum(
            one.nbytes + _cache_bytes(bundle, one)
            for one in engines.engines
            if one.context in (None, context)
        )
        for context in bundle.manifest.contexts
    }
