"""What runs graphs, seen from the chain: a protocol that every back end fills.

NumPy only. An executor owns weights, caches and rows, which are opaque here: anything that slices
like an array. The chain (``rows.py``) owns positions, orders, slots and gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Rows = Any
"""Hidden states (B, Q, D) in whatever form the executor keeps them."""


class StageResult(NamedTuple):
    """What an executor returns from one call of a stage."""

    rows: Rows
    queries: Any  # (layers, B, H, d): the last row's, rotated
    logits: Any | None


class Kept(NamedTuple):
    """What a selection leaves: K rows with the positions and orders they always had."""

    rows: Rows
    positions: np.ndarray
    order: np.ndarray
    scores: np.ndarray


class Executor(Protocol):
    """Runs graphs; one per back end."""

    def ensure_slots(self, stage: int, slots: int) -> int:
        """Make room for at least ``slots`` slots, keeping what is there; returns the new size."""

    def append(
        self,
        stage: int,
        rows: Rows,
        positions: np.ndarray,
        order: np.ndarray,
        slot_order: np.ndarray,
        write_index: int,
        gates: np.ndarray | None,
    ) -> StageResult:
        """One call of a stage (``contract.stage_spec``).

        An executor that asked for padding (``Chain``) gets fewer rows than orders: what lacks on
        the left is padding, which it returns no rows for.
        """

    def select(
        self,
        edge: int,
        probe_query: Any,
        slot_order: np.ndarray,
        query_order: np.ndarray,
        visual_slots: np.ndarray,
        rows: Rows,
        positions: np.ndarray,
        order: np.ndarray,
    ) -> Kept:
        """One call of a selection (``contract.select_spec``)."""

    def probe(
        self,
        stage: int,
        layer: int,
        query: Any,
        slot_order: np.ndarray,
        query_order: np.ndarray,
        visual_slots: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One probe of a layer of ``stage``: cosines and norms (``contract.probe_spec``)."""

    def concatenate(self, parts: Sequence[Rows]) -> Rows:
        """Join rows along Q."""

    def take(self, rows: Rows, index: np.ndarray) -> Rows:
        """Rows ``index`` (K,) of (B, Q, D) -> (B, K, D)."""
