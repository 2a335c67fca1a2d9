"""Decisions of a prompt's probes: when to select, which tokens to keep, when vision leaves.

Pure bookkeeping over the readings of one prompt, layer after layer; it knows neither stages nor
back ends. What it decides is what the published method would do; when it takes effect is the
chain's business, so that an adaptive plan can say by how many layers it came late.

Source: docs/methods.md, "VisiPruner: decision rules"; the numbers: ``plan.Probe``.
"""

from __future__ import annotations

import numpy as np

from .stages import Probe


class Decision:
    """The state of one prompt.

    Attributes:
        trigger: the layer that selected; None so far.
        kept: indices (K,) of the kept among the visual tokens offered, ascending; None so far.
        norms: (N,) contributions in the trigger layer, by which they were kept; None so far.
        exit: the layer that let vision leave; None so far.
    """

    def __init__(self, probe: Probe):
        self.probe = probe
        self.trigger: int | None = None
        self.kept: np.ndarray | None = None
        self.norms: np.ndarray | None = None
        self.exit: int | None = None
        self._quiet = 0
        self._may_leave = probe.exit_cosine is not None

    @property
    def settled(self) -> bool:
        """True once no reading can change anything."""
        if self.trigger is None:
            return False
        return not self._may_leave or self.exit is not None

    def read(self, layer: int, cosines: np.ndarray, norms: np.ndarray) -> None:
        """Note the probe of ``layer``.

        cosines, norms: one for each visual token that still counts: all of them up to the trigger,
        the kept ones from then on.
        """
        assert layer >= self.probe.first, layer
        if self.trigger is None:
            if (cosines < self.probe.cosine).any():
                strong = norms > self.probe.contribution
                if not self.probe.strict:
                    strong = norms >= self.probe.contribution
                self.trigger, self.norms = layer, norms
                self.kept = np.flatnonzero(strong)
                self._may_leave &= self.probe.whole_leaves or not strong.all()
            return
        if self.settled:
            return
        if (cosines >= self.probe.exit_cosine).all():
            self._quiet += 1
        elif self.probe.consecutive:
            self._quiet = 0
        if self._quiet == self.probe.exit_layers:
            self.exit = layer
