"""Calls of a stage in OpenVINO: how many rows go at once, and what stays bound for them.

A stage's compiled model takes any number of rows; every number has an infer request of its own,
whose tensors are NumPy arrays bound once for as long as the caches keep their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...graphs.contract import GraphSpec, appended

MOST_ROWS = 192
"""Rows of one call. Attention here writes its scores to memory; those of a whole picture leave the
processor's caches (576 rows of llava-45m: a fifth to a third of the call)."""

MOST_CALLS = 8
"""Numbers of rows whose arrays stay bound."""


class OpenVinoStage:
    """A stage's compiled model, and calls of it by their number of rows, latest last."""

    def __init__(self, ov: Any, model: Any, spec: GraphSpec):
        self.ov, self.model, self.spec = ov, model, spec
        self.calls: dict[int, BoundRequest] = {}

    def call(self, count: int, block: np.ndarray) -> BoundRequest:
        """The call of ``count`` rows, bound to the caches in ``block``."""
        call = self.calls.pop(count, None)
        if call is None:
            if len(self.calls) == MOST_CALLS:
                del self.calls[next(iter(self.calls))]
            call = BoundRequest(self.ov, self.model, self.spec, count, block)
        self.calls[count] = call
        return call


class BoundRequest:
    """One infer request with every tensor bound.

    Attributes:
        count: Q.
        arrays: inputs and outputs that are no caches, by name.
        new_rows: (2 * layers, 1, G, Q, d), what is to be written into the caches.
    """

    def __init__(self, ov: Any, model: Any, spec: GraphSpec, count: int, block: np.ndarray):
        self.count = count
        self.request = model.create_infer_request()
        self.new_rows = np.empty((*block.shape[:3], count, block.shape[4]), block.dtype)
        self.arrays: dict[str, np.ndarray] = {}
        sizes = {"B": 1, "Q": count, "S": block.shape[3]}
        caches = [one.name for one in spec.inputs if one.name.startswith(("key.", "value."))]
        bound = dict(zip(caches, block, strict=True))
        bound |= dict(zip(map(appended, caches), self.new_rows, strict=True))
        for one in (*spec.inputs, *spec.outputs):
            if one.name not in bound:
                array = np.zeros(shape_of(one.shape, sizes), one.dtype)
                bound[one.name] = self.arrays[one.name] = array
            self.request.set_tensor(one.name, ov.Tensor(bound[one.name], shared_memory=True))

    def fill(self, name: str, values: np.ndarray | int) -> None:
        """Copy an input in."""
        self.arrays[name][...] = values

    def copy(self, name: str) -> np.ndarray | None:
        """An output, safe from the next run; None where the graph has none of that name."""
        array = self.arrays.get(name)
        return None if array is None else array.copy()

    def run(self) -> None:
        """Compute; outputs stand in ``arrays`` and ``new_rows``."""
        # Starting and waiting returns nothing, where infer() would copy every output.
        self.request.start_async()
        self.request.wait()


def row_chunks(order: np.ndarray) -> Iterator[tuple[int, int]]:
    """How rows of a call are cut into alike pieces, (start, stop) each: ``order`` (1, Q).

    Where orders rise, no row sees a later one, and what a row sees is there when its turn comes.
    """
    count = order.shape[1]
    rising = (np.diff(order[0]) > 0).all()
    step = -(-count // -(-count // MOST_ROWS)) if rising else count
    for start in range(0, count, step):
        yield start, min(start + step, count)


def shape_of(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> list[int]:
    """A contract's shape with ``sizes`` for its symbols; -1 for those without."""
    return [sizes.get(d, -1) if isinstance(d, str) else d for d in shape]
