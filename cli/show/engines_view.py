"""The engines of a bundle: size, shapes, layers, attention and caches of each."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from ...graphs.bundle import Bundle
from ...graphs.caches import is_cache
from ...graphs.contract import GraphSpec
from ...graphs.engine_index import EngineFact, Engines
from ...pages.units import show_bytes, show_seconds


def engine_facts(bundle: Bundle) -> dict[str, Any] | None:
    """Return what ``visistage inspect`` shows of the engines, as JSON; None without engines."""
    engines = Engines.open(bundle)
    if engines is None:
        return None
    return {
        "backend": engines.backend,
        "version": engines.version,
        "gpus": engines.gpus(),
        "capabilities": [list(engine) for engine in engines.capabilities],
        "built_on": engines.built_on,
        "memory_bytes": _memory(bundle, engines),
        "engines": [
            {**asdict(engine), "cache_bytes": _cache_bytes(bundle, engine)}
            for engine in engines.engines
        ],
    }


def engine_table(bundle: Bundle) -> RenderableType:
    """Tabulate the same facts; nothing without engines."""
    engines = Engines.open(bundle)
    if engines is None:
        return Group()
    table = Table("engine", "size", "rows", "slots", "caches", "attention", "layers", "compiled in")
    for column in table.columns[1:5]:
        column.justify = "right"
    for engine in engines.engines:
        peak = f", peak {show_bytes(engine.peak_bytes)}" if engine.peak_bytes else ""
        cache = _cache_bytes(bundle, engine)
        table.add_row(
            engine.name,
            show_bytes(engine.nbytes),
            "\n".join(_rows(profile) for profile in engine.profiles if "rows" in profile),
            str(engine.slots or ""),
            f"{show_bytes(cache)}\n{_in_place(engine)}" if cache else "",
            _attention(engine),
            ", ".join(f"{count} {kind}" for kind, count in _most(engine.precisions)),
            f"{show_seconds(engine.seconds)}{peak}",
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


def _in_place(engine: EngineFact) -> str:
    return f"{engine.caches_in_place} in place" if engine.caches_in_place else "new rows returned"


def _attention(engine: EngineFact) -> str:
    if engine.fused_attention or engine.decomposable_attention:
        kinds = {"fused": engine.fused_attention, "decomposed": engine.decomposable_attention}
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return "basic layers"


def _most(counts: dict[str, int], shown: int = 3) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])[:shown]


def _cache_bytes(bundle: Bundle, engine: EngineFact) -> int:
    """Bytes of the caches that an engine appends to; a selection only reads a stage's."""
    if not engine.graph.startswith("stage"):
        return 0
    spec: GraphSpec = bundle.manifest.graphs[engine.graph].spec
    sizes = {"B": 1, "S": engine.slots}
    return sum(
        math.prod(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
        * np.dtype(tensor.dtype).itemsize
        for tensor in spec.inputs
        if is_cache(tensor.name)
    )


def _memory(bundle: Bundle, engines: Engines) -> dict[int, int]:
    """Bytes that the engines for each context length need, caches included."""
    return {
        context: sum(
            engine.nbytes + _cache_bytes(bundle, engine)
            for engine in engines.engines
            if engine.context in (None, context)
        )
        for context in bundle.manifest.contexts
    }
