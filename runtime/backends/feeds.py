"""Arrays that graphs are fed: those stored in the bundle, and those of a call.

They are the same for every executor; one on a device turns them into buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle, Manifest, TensorRef
from ...graphs.caches import appended, scored_layer, select_caches
from ...graphs.chain.enter import choose_rows, encoded
from ...graphs.chain.executor import ANY_IMAGE, Encoded, Kept
from ...graphs.contract import BY_LAYER, GraphSpec, TensorSpec, inject_name, injected_of
from ...graphs.errors import BundleError
from ...graphs.parts import ENTRY, PROBE, PROJECT, SERVE, VISION
from ...graphs.vision_contract import projects_later


def map_tensor(bundle: Bundle, ref: TensorRef) -> np.ndarray:
    """Map a stored array read-only; BF16 comes as its raw 16 bits (see ``widen``)."""
    file = bundle.file(ref.file)
    dtype = np.dtype("uint16" if ref.dtype == "bfloat16" else ref.dtype).newbyteorder("<")
    try:
        return np.memmap(file, dtype, "r", ref.offset, ref.shape)
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} is too short for a tensor the manifest places in it") from error


def widen(array: np.ndarray, ref: TensorRef, dtype: np.dtype) -> np.ndarray:
    """Copy stored values into ``dtype``; BF16 is the upper half of an FP32."""
    if ref.dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype)


class Embedding:
    """Token ids to rows, read from the mapped table: only the rows asked for are touched."""

    def __init__(self, bundle: Bundle, dtype: np.dtype):
        self.ref, self.dtype = bundle.manifest.embedding, dtype
        self.table = np.asarray(map_tensor(bundle, self.ref))  # a plain view: faster to index

    def __call__(self, ids) -> np.ndarray:
        """Return the rows (1, Q, D) of ``ids``."""
        return widen(self.table[np.asarray(ids, np.int64)], self.ref, self.dtype)[None]


def stored_cache_scales(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    """Return, by layer, the scales (G,) that graphs reading its cache take, by input name.

    They are those of ``contract.scale_specs``; none where caches hold floats.
    """
    ref = bundle.manifest.cache_scales
    if ref is None:
        return [{}] * bundle.manifest.config.text.layers
    keys, values = np.array(map_tensor(bundle, ref))
    return [
        {"key_scale": key, "value_scale": value} for key, value in zip(keys, values, strict=True)
    ]


def stage_feeds(
    positions: np.ndarray,
    order: np.ndarray,
    slot_order: np.ndarray,
    write_index: int | np.ndarray,
    by_layer: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return what the host decides of a stage's call, by input name (``contract.stage_spec``)."""
    return {
        "positions": positions,
        "order": order,
        "slot_order": slot_order,
        "write_index": np.full(len(order), write_index, np.int64),
        **by_layer,
    }


def inject_feeds(
    specs: Sequence[TensorSpec],
    inject: Mapping[int, np.ndarray],
    call: tuple[int, int],
    start: int = 0,
) -> dict[str, np.ndarray]:
    """Return what ``specs``, inputs of a stage, add to the (B, Q) rows of a call, by name.

    ``inject``: by layer, (B, V, D) for the rows from ``start`` on; zeros elsewhere, which are kept.
    """
    found = {}
    for layer, spec in injected_of({spec.name: spec for spec in specs}).items():
        given = inject.get(layer)
        if given is None:
            found[spec.name] = _zeros(
                shape_of(spec, dict(zip("BQ", call, strict=True))), spec.dtype
            )
        else:
            rest = call[1] - start - given.shape[1]
            found[spec.name] = np.pad(given, ((0, 0), (start, rest), (0, 0)))
    return found


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.zeros(shape, dtype)


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a tensor's shape with ``sizes`` for its symbols."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)


def sizes_of(spec: GraphSpec, feeds: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of all symbols of a graph's inputs, from arrays that it is fed."""
    return {
        dim: feeds[tensor.name].shape[axis]
        for tensor in spec.inputs
        for axis, dim in enumerate(tensor.shape)
        if isinstance(dim, str)
    }


def layers_taking(spec: GraphSpec) -> dict[str, int]:
    """Return how many layers of a graph each of its inputs has an entry for (``BY_LAYER``)."""
    return {tensor.name: int(tensor.shape[0]) for tensor in spec.inputs if tensor.name in BY_LAYER}


class PromptCalls:
    """Calls that a prompt makes once, of any executor: encoding, selections and probes.

    Attributes:
        plan, manifest: of the bundle.
        scales: ``stored_cache_scales``.
    """

    plan: Any
    manifest: Manifest
    scales: list[dict[str, np.ndarray]]

    @property
    def axes(self) -> int:
        """Positions that a row has."""
        return self.manifest.config.text.rope.axes

    def cache(self, stage: int, name: str) -> Any:
        """Return a whole cache of ``stage``, by its input name."""
        raise NotImplementedError

    def call_graph(self, graph: str, stage: int, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs of a graph; ``feeds`` may hold more than it reads.

        ``stage`` is the one whose caches are among them.
        """
        raise NotImplementedError

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Count the time of a block as that of ``name``."""
        raise NotImplementedError

    def to_host(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Return outputs of one call as arrays of the host."""
        return [np.asarray(array) for array in arrays]

    def take(self, rows: Any, index: np.ndarray) -> Any:
        """Take rows ``index`` (K,), or (B, K), of (B, Q, D) -> (B, K, D)."""
        raise NotImplementedError

    def encode(
        self,
        pixels: np.ndarray,
        images: Sequence[str] = (ANY_IMAGE,),
        feeds: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Encoded:
        """Return the visual rows that enter stage 0, of pixels as the vision graph takes them.

        ``images``: digests of what they show. ``feeds``: its other inputs (``ImageLayout``).
        """
        out = self.call_graph(VISION, 0, {"pixels": pixels, **feeds})
        inject = injected_of(out)
        if self.plan.entry is None:
            rows = out["visual_rows"]
            return Encoded(rows, np.tile(np.arange(rows.shape[1]), (rows.shape[0], 1)), inject)
        with self.timed(ENTRY):
            chosen = [choose_rows(self.plan, out, image, at) for at, image in enumerate(images)]
        source = "features" if projects_later(self.manifest.config, self.plan) else "visual_rows"
        if len(chosen) == 1 and chosen[0].features is None:
            rows = self.take(out[source], chosen[0].source)
        else:
            whole = np.asarray(out[source])
            merged = [
                whole[at, rows.source] if rows.features is None else rows.features
                for at, rows in enumerate(chosen)
            ]
            rows = np.stack(merged).astype(whole.dtype)
        if projects_later(self.manifest.config, self.plan):
            rows = self.call_graph(PROJECT, 0, {"features": rows})["visual_rows"]
        index = np.stack([entered.source for entered in chosen])
        taken = {layer: self.take(whole, index) for layer, whole in inject.items()}
        return encoded(rows, chosen, taken)

    def restore(self, stage: int, start: int, saved: Mapping[str, Any]) -> None:
        """Write rows (B, G, n, d) to a stage's caches, by their names, from slot ``start`` on."""
        raise NotImplementedError

    def serve(self, stage, rows, positions, write_index, inject) -> Any:
        """Call the graphs of visual rows that no layer of ``stage`` changes."""
        added = {inject_name(layer): features for layer, features in inject.items()}
        for graph in self.manifest.parts_of(stage, SERVE):
            out = self.call_graph(graph, stage, {"rows": rows, "positions": positions, **added})
            rows = out.pop("rows.out", rows)
            new = {name.removesuffix(appended("")): own for name, own in out.items()}
            self.restore(stage, write_index, new)
        return rows

    def select(self, edge: int, feeds: Mapping[str, Any]) -> Kept:
        """Call a selection over a layer's cache of stage ``edge``."""
        scales = self.scales[scored_layer(self.plan, edge)]
        caches = self._caches(edge, select_caches(self.plan, edge))
        out = self.call_graph(f"select{edge}", edge, {**scales, **caches, **feeds})
        read = [out[name] for name in ("positions.out", "order.out", "scores")]
        return Kept(out["rows.out"], *self.to_host(read))

    def probe(
        self, stage, layer, query, slot_order, query_order, visual_slots
    ) -> tuple[np.ndarray, np.ndarray]:
        """Call the probe of a layer of ``stage``; the decision is the host's."""
        own = {"key": f"key.{layer}", "value": f"value.{layer}"}
        feeds = (
            self.scales[layer]
            | self._caches(stage, own)
            | {
                "query": query,
                "slot_order": slot_order,
                "query_order": query_order,
                "visual_slots": visual_slots,
            }
        )
        out = self.call_graph(PROBE, stage, feeds)
        cosine, norm = self.to_host([out["cosine"], out["norm"]])
        return cosine, norm

    def _caches(self, stage: int, names: Mapping[str, str]) -> dict[str, Any]:
        return {graph: self.cache(stage, name) for graph, name in names.items()}
