"""The executor of graphs as the chain sees it: a protocol that every back end fills.

NumPy only. An executor owns weights, caches and rows, which are opaque here: anything that slices
like an array. The chain (``rows.py``) owns positions, orders, slots and gates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

Rows = Any
"""Hidden states (B, Q, D) in whatever form the executor keeps them."""


ANY_IMAGE = "00"
"""Stand-in for the digest of an image where nothing depends on it."""


class StageResult(NamedTuple):
    """Result of one call of a stage."""

    rows: Rows
    queries: Any  # (layers, B, H, d): the last row's, rotated
    logits: Any | None
    readings: Mapping[str, Any] = MappingProxyType({})
    """Readings of the rows for the edge behind, (B, Q, ...) each (``contract.row_readings``)."""


class Kept(NamedTuple):
    """Rows that a selection leaves: K of them, with the positions and orders they always had."""

    rows: Rows
    positions: np.ndarray
    order: np.ndarray
    scores: np.ndarray


class Encoded(NamedTuple):
    """The rows of an image that enter stage 0, (B, K0, D), the patches they stand for, (B, K0)
    int64, and which of them were matched, (B, K0) bool, where they are told apart.

    Patches: 0 to N - 1, ascending; -1: the class row; ``selectors.entry.PADDING``: no row at all.
    inject: what is added to these rows, (B, K0, D) each, by the decoder layer at whose input.
    """

    rows: Rows
    patches: np.ndarray
    inject: Mapping[int, Rows] = MappingProxyType({})
    matched: np.ndarray | None = None


class Executor(Protocol):
    """Runs graphs; one per back end."""

    @property
    def axes(self) -> int:
        """Positions that a row has (``text_config.Rope.axes``)."""

    def ensure_slots(self, stage: int, slots: int) -> int:
        """Make room for at least ``slots`` slots, keeping what is there; returns the new size."""

    def append(
        self,
        stage: int,
        rows: Rows,
        positions: np.ndarray,
        order: np.ndarray,
        slot_order: np.ndarray,
        write_index: int | np.ndarray,
        by_layer: Mapping[str, np.ndarray],
        inject: Mapping[int, Rows],
    ) -> StageResult:
        """Run one call of a stage (``contract.stage_spec``).

        ``positions``: (B, Q), or (B, Q, A) where rows have several.

        ``by_layer``: those of ``contract.BY_LAYER`` that the stage takes. ``write_index``: (B,)
        where lanes of several prompts are decoded together (``lanes``).

        An executor that asked for padding (``Chain``) gets fewer rows than orders: what lacks on
        the left is padding, which it returns no rows for.

        ``inject``: by layer, (B, V, D) that is added to the first V rows behind the padding, and
        nothing to others; a layer that lacks gets nothing.
        """

    def serve(
        self,
        stage: int,
        rows: Rows,
        positions: np.ndarray,
        write_index: int,
        inject: Mapping[int, Rows],
    ) -> Rows:
        """Write keys and values of visual rows that no layer of a stage changes to its slots from
        ``write_index`` on (``contract.serve_spec``); return the rows.

        ``inject``: as for ``append``, of all rows.
        """

    def select(
        self,
        edge: int,
        feeds: Mapping[str, Any],
    ) -> Kept:
        """Run one call of a selection (``contract.select_spec``).

        ``feeds``: all its inputs but caches and their scales, by name, and perhaps more.
        """

    def probe(
        self,
        stage: int,
        layer: int,
        query: Any,
        slot_order: np.ndarray,
        query_order: np.ndarray,
        visual_slots: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probe a layer of ``stage``: cosines and norms (``contract.probe_spec``)."""

    def concatenate(self, parts: Sequence[Rows]) -> Rows:
        """Join rows along Q."""

    def take(self, rows: Rows, index: np.ndarray) -> Rows:
        """Take rows ``index`` (K,), or (B, K), of (B, Q, D) -> (B, K, D)."""


GRAPH_CALLS = ("encode", "serve", "append", "select", "probe")
"""Methods of an executor that run a graph; ``encode`` is the runtime's, for the vision encoder."""

NoteCall = Callable[[str, tuple, Any, float, float], None]
"""(method, arguments, result, start and stop in seconds of ``time.perf_counter``)."""


@contextmanager
def observed(executor: Any, note: NoteCall) -> Iterator[None]:
    """Report every call of ``executor`` that runs a graph, until the block ends.

    The methods are wrapped in place, so that calls are seen whatever object makes them.
    """

    def wrap(name: str) -> Callable[..., Any]:
        method = getattr(executor, name)

        def run(*given: Any) -> Any:
            start = time.perf_counter()
            result = method(*given)
            note(name, given, result, start, time.perf_counter())
            return result

        return run

    wrapped = [name for name in GRAPH_CALLS if hasattr(executor, name)]
    for name in wrapped:
        setattr(executor, name, wrap(name))
    try:
        yield
    finally:
        for name in wrapped:
            delattr(executor, name)
