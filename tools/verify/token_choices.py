"""The selection that a plan makes for one prompt, and the distance between two selections.

FP16 rounds scores and probes, so where two tokens score alike, or a reading is at a threshold, it
may select otherwise than FP32. That is no fault; the answer can then be compared only with a
reference that is forced to the same selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...graphs.plan.stages import Probe

APART = float("inf")


@dataclass(frozen=True)
class Selection:
    """Positions that the last selection kept (None without one), and, of a plan that decides per
    prompt, the layer that triggered a selection and the one that let vision leave; ``at_edges``:
    what each selection within the decoder kept.
    """

    kept: tuple[int, ...] | None = None
    trigger: int | None = None
    exit: int | None = None
    at_edges: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls, kept: tuple[int, ...] | None, decision: Any, at_edges: tuple[tuple[int, ...], ...]
    ) -> Selection:
        """Take trigger and exit from a ``decision``; None: the plan does not decide per prompt."""
        trigger, exit_ = (None, None) if decision is None else (decision.trigger, decision.exit)
        return cls(kept, trigger, exit_, at_edges)

    def difference(self, want: Selection) -> str:
        """Describe the first difference from ``want``."""
        if want.trigger != self.trigger:
            return f"layer {self.trigger} called for a selection, expected {want.trigger}"
        if (want.kept, want.at_edges) != (self.kept, self.at_edges):
            return "other visual tokens were kept"
        return f"vision left after layer {self.exit}, expected {want.exit}"


@dataclass(frozen=True)
class ProbeReading:
    """A probe's reading of one layer, by position of the visual tokens that still counted."""

    cosines: Mapping[int, float]
    norms: Mapping[int, float]

    @property
    def lowest(self) -> float:
        """The cosine that decides."""
        return min(self.cosines.values(), default=1.0)


@dataclass(frozen=True)
class SelectionMargins:
    """The numbers that a selection rests on: ``scores`` of what each one was offered, by position;
    ``readings`` by layer, where probes decide by the numbers of ``probe``.
    """

    scores: Sequence[Mapping[int, float]] = ()
    probe: Probe | None = None
    readings: Mapping[int, ProbeReading] = field(default_factory=dict)


def selection_margin(margins: SelectionMargins, ours: Selection, theirs: Selection) -> float:
    """Return how far ``theirs`` is from a selection that ``margins`` would allow as well.

    0 where they are equal. Scores and norms count in their spread, cosines in their threshold's
    distance from 1. Where rows are selected more than once, ``margins`` are of a run that had made
    the selections ``theirs``: each is then one that its own scores allow.
    """
    if ours == theirs:
        return 0.0
    if margins.probe is None:
        if not len(theirs.at_edges) == len(ours.at_edges) == len(margins.scores) > 0:
            return APART
        return max(map(_ranking_gap, margins.scores, theirs.at_edges))
    if ours.trigger != theirs.trigger:
        layer = min(t for t in (ours.trigger, theirs.trigger) if t is not None)
        return _cosine_gap(margins, [layer], margins.probe.cosine)
    assert ours.trigger is not None
    changed = set(ours.kept or ()) ^ set(theirs.kept or ())
    if changed:
        norms = margins.readings[ours.trigger].norms
        if not changed <= set(norms):
            return APART
        return max(abs(norms[at] - margins.probe.contribution) for at in changed) / _spread(norms)
    assert margins.probe.exit_cosine is not None
    last = min(layer for layer in (ours.exit, theirs.exit) if layer is not None)
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
    """Return readings of ``layer`` that make a plan choose ``selection``, shaped as the real ones.

    ``positions``: (N,); ``cosines``, ``norms``: (1, N), the real ones.
    """
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


def _ranking_gap(scores: Mapping[int, float], kept: Sequence[int]) -> float:
    """Return how far the tokens kept score below those dropped for them."""
    if not set(kept) <= set(scores):
        return APART
    dropped = [score for at, score in scores.items() if at not in kept]
    gap = max(dropped, default=-APART) - min((scores[at] for at in kept), default=APART)
    return max(gap, 0.0) / _spread(scores)


def _cosine_gap(margins: SelectionMargins, layers: Iterable[int], threshold: float) -> float:
    """Return how far the nearest of some layers' cosines is from a threshold."""
    lowest = [margins.readings[layer].lowest for layer in layers if layer in margins.readings]
    near = min((abs(cosine - threshold) for cosine in lowest), default=APART)
    return near / max(1.0 - threshold, 1e-6)


def _spread(values: Mapping[int, float]) -> float:
    return float(np.std(list(values.values()))) or 1.0
