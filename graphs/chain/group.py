"""Reading and writing in turn, with positions and orders of their own for what is read and written.

Rows of the source are at 0, 1, ... over all that was read so far; rows of the target at phi,
phi + 1, ..., counted apart. Positions of the two coincide, orders do not:

    source row i    position i          order i
    target row j    position phi + j    order TARGET_ORDER + j

So a source row sees the source before it and never the target; a target row sees all that was read
by then, and the target before it. Later reads take later slots and lower orders: what rows before
them saw, and their keys and values, stay as they are. NumPy only; any executor.

Source: docs/methods.md, "Group positions".
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ..errors import CapacityError, PlanError
from ..families.family import ImageLayout
from .chain import Chain
from .executor import Rows
from .rows import AppendedRows

TARGET_ORDER = 1 << 30
"""Order of the first row of the target, above that of any source."""


class GroupReader:
    """Rows read and written through a chain whose slots are empty, of a plan that prunes nothing.

    Attributes:
        source, target: rows read and written so far.

    Raises:
        PlanError: another plan than one dense stage; ``phi`` is no position.
    """

    def __init__(self, chain: Chain, phi: int = 0):
        plan = chain.plan
        first = plan.stages[0]
        if len(plan.stages) > 1 or first.gated_layers or first.frozen or plan.entry is not None:
            raise PlanError(
                f"plan '{plan.name}' treats visual rows apart, and with group positions rows are "
                "read at any time. Build the bundle with --plan dense"
            )
        if not 0 <= phi < TARGET_ORDER:
            raise PlanError(f"phi is {phi}, expected the position of the target's first row")
        self.chain, self.phi = chain, phi
        self.source = self.target = 0
        self.lag = 0  # by how much positions of the source are behind its orders

    def read(
        self,
        rows: Rows,
        inject: Mapping[int, Rows] = MappingProxyType({}),
        layout: ImageLayout | None = None,
    ) -> None:
        """Append rows (B, Q, D) to the source, text and visual ones alike.

        ``inject``: of visual rows, what is added to them (``AppendedRows``); ``layout``: of an
        image, where each row has a place of its own; by default they follow each other.
        """
        order = self._numbered(self.source, rows.shape[1])
        at = order - self.lag
        if layout is not None and layout.positions.shape[1] > 1:
            at = at[:, :1, None] + layout.positions
            self.lag += rows.shape[1] - sum(layout.advance)
        self.chain.append(0, [AppendedRows(bool(inject), rows, at, order, inject)])
        self.source += rows.shape[1]

    def write(self, rows: Rows) -> np.ndarray:
        """Append rows (B, Q, D) to the target; return the logits (B, Q, V) of each.

        One call a row: a graph gives the logits of a call's last row.
        """
        out = []
        for place in range(rows.shape[1]):
            at = self._numbered(self.target, 1)
            segment = AppendedRows(
                False, rows[:, place : place + 1], at + self.phi, at + TARGET_ORDER
            )
            out.append(np.asarray(self.chain.decode(segment)))
            self.target += 1
        return np.stack(out, 1)

    def take_back(self, count: int = 1) -> None:
        """Forget the last ``count`` rows of the target, behind which nothing was read yet."""
        slots = self.chain.slots[0]
        last = slots.order[0, slots.used - count : slots.used]
        if count > self.target or not (last >= TARGET_ORDER).all():
            raise CapacityError(f"the last {count} rows are not the target's. Write them first")
        slots.rewind(slots.used - count)
        self.target -= count

    def _numbered(self, first: int, count: int) -> np.ndarray:
        """Return (B, Q) int32 from ``first`` on, for every sample alike."""
        numbers = np.arange(first, first + count, dtype=np.int32)
        return np.tile(numbers, (self.chain.batch, 1))
