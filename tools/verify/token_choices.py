"""What a plan chose for one prompt, and how far two choices are apart.

FP16 rounds scores and probes, so where two tokens score alike, or a reading lies on a threshold, it
may choose otherwise than FP32. That is no fault; what comes of it can be compared only with a
reference that is led to the same choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...graphs.plan.stages import Probe

APART = float("inf")


@dataclass(frozen=True)
class Selection:
    """Positions that the last selection kept (None without one), and, of a plan that decides per
    prompt, the layer that called for a selection and the one that let vision leave.
    """

    kept: tuple[int, ...] | None = None
    trigger: int | None = None
    exit: int | None = None


@dataclass(frozen=True)
class ProbeReading:
    """What a probe read in one layer, by position of the visual tokens that still counted."""

    cosines: Mapping[int, float]
    norms: Mapping[int, float]

    @property
    def lowest(self) -> float:
        """The cosine that decides."""
        return min(self.cosines.values(), default=1.0)


@dataclass(frozen=True)
class SelectionMargins:
    """Why the reference chose as it did: ``scores`` of what the last selection was offered, by
    position; ``readings`` by layer, where probes decide by the numbers of ``probe``.
    """

    scores: Mapping[int, float] = field(default_factory=dict)
    probe: Probe | None = None
    readings: Mapping[int, ProbeReading] = field(default_factory=dict)


def selection_margin(margins: SelectionMargins, ours: Selection, theirs: Selection) -> float:
    """How far ``theirs`` lies from what ``margins`` would allow as well; 0 where they are equal.

    Scores and norms count in their spread, cosines in their threshold's distance from 1.
    """
    if ours == theirs:
        return 0.0
    if margins.probe is None:
        return _ranking_gap(margins.scores, ours.kept, theirs.kept)
    if ours.trigger != theirs.trigger:
        layer = min(one for one in (ours.trigger, theirs.trigger) if one is not None)
        return _cosine_gap(margins, [layer], margins.probe.cosine)
    assert ours.trigger is not None
    changed = set(ours.kept or ()) ^ set(theirs.kept or ())
    if changed:
        norms = margins.readings[ours.trigger].norms
        if not changed <= set(norms):
            return APART
        spread = float(np.std(list(norms.values()))) or 1.0
        return max(abs(norms[at] - margins.probe.contribution) for at in changed) / spread
    assert margins.probe.exit_cosine is not None
    last = min(one for one in (ours.exit, theirs.exit) if one is not None)
    layers = [layer for layer in margins.readings if ours.trigger < layer <= last]
    return _cosine_gap(margins, layers, margins.probe.exit_cosine)


def forced_readings(
    probe: Probe,
    selection: Selection,
    layer: int,
    positions: np.ndarray,
    cosines: np.ndarray,
    norms: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Readings of ``layer`` that make a plan choose ``selection``, in place of (1, N) real ones."""
    if selection.trigger is None or layer < selection.trigger:
        return np.ones_like(cosines), norms
    if layer == selection.trigger:
        wanted = np.isin(positions, selection.kept or ())
        strong = np.where(wanted, np.float32(np.inf), np.float32(-1.0))
        return np.full_like(cosines, -1.0), strong[None].astype(norms.dtype)
    quiet = (
        selection.exit is not None and selection.exit - probe.exit_layers < layer <= selection.exit
    )
    return np.full_like(cosines, 1.0 if quiet else -1.0), norms


def _ranking_gap(
    scores: Mapping[int, float], ours: tuple[int, ...] | None, theirs: tuple[int, ...] | None
) -> float:
    """How far the tokens kept score below those dropped for them."""
    mine, other = set(ours or ()), set(theirs or ())
    if len(mine) != len(other) or not mine ^ other <= set(scores):
        return APART
    best = max(scores[at] for at in mine - other)
    worst = min(scores[at] for at in other - mine)
    return (best - worst) / (float(np.std(list(scores.values()))) or 1.0)


def _cosine_gap(margins: SelectionMargins, layers: list[int], threshold: float) -> float:
    """How far the nearest of some layers' cosines lies from a threshold."""
    lowest = [margins.readings[layer].lowest for layer in layers if layer in margins.readings]
    near = min((abs(one - threshold) for one in lowest), default=APART)
    return near / max(1.0 - threshold, 1e-6)
