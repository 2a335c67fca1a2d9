"""What linear layers are given and caches keep while prompts walk through a plan, as ranges.

    rows of a layer ──▶ largest |x| per channel, histogram        every row, as it comes
                   └──▶ an even share of the rows, all kinds      kept until the layer is done
    weights at hand ──▶ factors searched, errors and sensitivities measured; rows let go

Ranges of the stages' own rows are what a bundle runs on: the middle sees few visual rows and text,
the end text alone. Rows of the prefix, which bundles compute in float, do not count for layers, but
they do for caches: whatever computed them, they are stored in the same tensor under the same scale,
and the first token's keys are often the largest of all. Memory is bounded: one layer's weights, one
layer's kept rows, and the rows on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
from torch import Tensor

from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.quantize.calibration_file import RowsSeen
from ...compile.quantize.group_ranges import GroupRanges, best_observer
from ...compile.quantize.int_arithmetic import activation_scale
from ...graphs.config import ModelConfig, TextConfig
from ...graphs.errors import ModelError
from ...graphs.linears import Group, linear_groups
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from ...graphs.quantization import OBSERVERS, Observer
from ..sample_prompts import SamplePrompt
from .layerwise import run_layerwise
from .observers import Histogram, threshold
from .smoothing import (
    SAMPLE_OUTPUTS,
    SAMPLE_ROWS,
    quantisation_error,
    search_awq,
    search_smoothing,
    sensitivity,
)

ROWS_KEPT = 4096
"""Rows that are kept of one group at most: 180 MB of 11008 channels."""


class Collected(NamedTuple):
    """What a walk measured.

    groups: ranges of every group of linear layers, by name, in the order in which a prompt meets
    them. cache: (2, L, G) FP32, the largest absolute key and value of each layer and head.
    """

    groups: dict[str, GroupRanges]
    cache: np.ndarray


def collect(
    checkpoint: Checkpoint,
    prompts: Sequence[SamplePrompt],
    plan: StagePlan,
    prefix_ids: Sequence[int] = (),
    *,
    rows: RowsSeen = "stage",
    include_prefix: bool = False,
    progress: Callable[[int], None] = lambda pieces: None,
) -> Collected:
    """Ranges of every group of linear layers and of every cache.

    Args:
        checkpoint: weights of any type; computed in FP32.
        prompts: at least one with a picture.
        plan: static; whose stages see the rows.
        prefix_ids: token ids before every picture, whose rows bundles compute in float.
        rows: ``dense`` measures the unpruned model's rows instead of the plan's.
        include_prefix: run the prefix too, and let its rows count for linear layers.
        progress: told of ``run_layerwise.pieces(config, () if include_prefix else prefix_ids)``
        pieces.

    Raises:
        ModelError: a layer is given NaN or infinity.
        PlanError, PromptError, CapacityError: as ``run_layerwise.walk``.
    """
    config = checkpoint.config
    if rows == "dense":
        plan = preset("dense", config.text.layers, config.visual_tokens)
    collector, caches = Collector(config), CacheRanges(config.text)
    before = () if include_prefix else prefix_ids
    run_layerwise(
        checkpoint,
        prompts,
        plan,
        before,
        observer=collector,
        storing=caches.add,
        want_logits=False,
        progress=progress,
    )
    return Collected(collector.ranges(), caches.largest)


class CacheRanges:
    """A ``run_layerwise.Storing``: the largest absolute key and value of each layer and head.

    Attributes:
        largest: (2, L, G) FP32: of keys, of values.
    """

    def __init__(self, text: TextConfig):
        self.largest = np.zeros((2, text.layers, text.kv_heads), np.float32)

    def add(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take one prompt's cache (G, S, d) of a layer into account.

        Raises:
            ModelError: it holds NaN or infinity.
        """
        for of, (what, rows) in zip(self.largest, (("key", keys), ("value", values)), strict=True):
            found = rows.abs().amax((1, 2)).numpy()
            if not np.isfinite(found).all():
                raise ModelError(
                    f"a {what} of layer {layer} is NaN or infinity, expected finite numbers only. "
                    "Check the checkpoint, and the samples that it was run on."
                )
            np.maximum(of[layer], found, out=of[layer])


class Collector:
    """A ``watch.Watcher`` that measures each group as soon as its piece is done."""

    def __init__(self, config: ModelConfig, rows_kept: int = ROWS_KEPT):
        self.rows_kept = rows_kept
        self._groups = {group.name: group for group in linear_groups(config)}
        self._chosen: list[np.ndarray] = []
        self._open: dict[str, _Inputs] = {}
        self._done: dict[str, _Measured] = {}

    def enter(self, kinds: Sequence[np.ndarray]) -> None:
        """Choose the rows to keep."""
        self._chosen = chosen_rows(kinds, self.rows_kept)

    def given(self, linear: str, rows: Tensor) -> None:
        """Take the inputs of a group's first layer; the others are given the same."""
        if linear in self._groups:
            if linear not in self._open:
                kept = sum(map(len, self._chosen))
                self._open[linear] = _Inputs(linear, rows.shape[1], kept)
            inputs = self._open[linear]
            inputs.add(rows.numpy(), self._chosen[inputs.calls])

    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """Measure the groups of this piece."""
        for name, inputs in self._open.items():
            group = self._groups[name]
            layers = {linear: weights[f"{linear}.weight"].numpy() for linear in group.linears}
            self._done[name] = _measured(group, inputs, layers)
        self._open = {}

    def ranges(self) -> dict[str, GroupRanges]:
        """Of all groups that were seen; sensitivities are those under the best observer."""
        best = best_observer(one.ranges for one in self._done.values())
        return {name: self._done[name].under(best) for name in self._groups if name in self._done}


def chosen_rows(kinds: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """Which rows of each call to keep: at most ``most`` in all, each kind evenly.

    A kind that is rare is kept whole before a frequent one gets more than its share, or text would
    drown among visual rows.
    """
    every = np.concatenate(kinds)
    keep = np.zeros(len(every), bool)
    names, counts = np.unique(every, return_counts=True)
    free = most
    for place, index in enumerate(np.argsort(counts, kind="stable")):
        count = min(int(counts[index]), free // (len(names) - place))
        where = np.flatnonzero(every == names[index])
        keep[where[np.linspace(0, len(where) - 1, count).round().astype(int)]] = True
        free -= count
    ends = np.cumsum([len(one) for one in kinds])[:-1]
    return [np.flatnonzero(part) for part in np.split(keep, ends)]


class _Inputs:
    """What one group has been given so far."""

    def __init__(self, name: str, width: int, kept: int):
        self.rows = self.calls = self._filled = 0
        self.absmax = np.zeros(width, np.float32)
        self.total = np.zeros(width, np.float64)  # of |x|
        self.histogram = Histogram(f"the input of {name}")
        self.kept = np.empty((kept, width), np.float32)

    def add(self, rows: np.ndarray, chosen: np.ndarray) -> None:
        """rows: (Q, K), of which ``chosen`` are kept."""
        self.histogram.add(rows)
        size = np.abs(rows)
        np.maximum(self.absmax, size.max(0), out=self.absmax)
        self.total += size.sum(0, dtype=np.float64)
        stop = self._filled + len(chosen)
        self.kept[self._filled : stop] = rows[chosen]
        self.rows, self.calls, self._filled = self.rows + len(rows), self.calls + 1, stop


@dataclass(frozen=True)
class _Measured:
    """Ranges of a group, and the W8A8 error of each of its layers by observer, smoothed."""

    ranges: GroupRanges
    errors: Mapping[str, Mapping[str, float]]

    def under(self, observer: str) -> GroupRanges:
        """The ranges, sensitivities completed for one observer."""
        complete = {
            linear: {"w8a8": self.errors[linear][observer], **others}
            for linear, others in self.ranges.sensitivity.items()
        }
        return replace(self.ranges, sensitivity=complete)


def _measured(group: Group, inputs: _Inputs, weights: Mapping[str, np.ndarray]) -> _Measured:
    """All there is to know of one group; ``weights`` (N, K) by layer."""
    rows, matrices = inputs.kept, list(weights.values())
    ones = np.ones(group.inputs, np.float32)
    alpha = aware_alpha = None
    factors = aware = ones
    if group.fold is not None:
        smooth = search_smoothing(rows, matrices, input_absmax=inputs.absmax)
        alpha, factors = smooth.alpha, smooth.factors
        awake = search_awq(rows, matrices, input_mean=inputs.total / inputs.rows)
        aware_alpha, aware = awake.alpha, awake.factors

    plain = _thresholds(inputs.histogram)
    smoothed = plain if alpha is None else _smoothed(inputs, factors, group.name)
    some = evenly(rows, SAMPLE_ROWS)
    each = {linear: evenly(weight, SAMPLE_OUTPUTS) for linear, weight in weights.items()}
    errors = {linear: _errors(some, weight, plain) for linear, weight in each.items()}
    after = errors
    if alpha is not None:
        after = {
            linear: _errors(some / factors, weight * factors, smoothed)
            for linear, weight in each.items()
        }
    unused = activation_scale(inputs.histogram.maximum)
    bare = {linear: sensitivity(some, weight, unused) for linear, weight in each.items()}
    careful = {
        linear: sensitivity(some / aware, weight * aware, unused)["w4"]
        for linear, weight in each.items()
    }
    ranges = GroupRanges(
        rows=inputs.rows,
        rows_used=inputs.rows if alpha is None else len(rows),
        absmax=inputs.absmax,
        alpha=alpha,
        factors=factors,
        aware_alpha=aware_alpha,
        aware=aware,
        thresholds=plain,
        smoothed_thresholds=smoothed,
        errors=_mean(errors),
        smoothed_errors=_mean(after),
        weight_error=float(np.mean([one["w4"] for one in bare.values()])),
        aware_error=float(np.mean(list(careful.values()))),
        sensitivity={
            linear: {"w8": bare[linear]["w8"], "w4": careful[linear]} for linear in weights
        },
    )
    return _Measured(ranges, after)


def _smoothed(inputs: _Inputs, factors: np.ndarray, name: str) -> dict[str, float]:
    """Thresholds of the inputs divided by ``factors``; the largest is known of every row."""
    histogram = Histogram(f"the smoothed input of {name}")
    for start in range(0, len(inputs.kept), SAMPLE_ROWS):
        histogram.add(inputs.kept[start : start + SAMPLE_ROWS] / factors)
    return {**_thresholds(histogram), "minmax": float((inputs.absmax / factors).max())}


def _thresholds(histogram: Histogram) -> dict[str, float]:
    """By observer."""
    return {name: threshold(histogram, name) for name in get_args(Observer)}


def _errors(
    rows: np.ndarray, weight: np.ndarray, thresholds: Mapping[str, float]
) -> dict[str, float]:
    """W8A8 error of one layer by observer."""
    return {
        observer: quantisation_error(rows, weight, activation_scale(limit))
        for observer, limit in thresholds.items()
    }


def _mean(errors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By observer, over layers."""
    return {name: float(np.mean([one[name] for one in errors.values()])) for name in OBSERVERS}


def evenly(matrix: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` rows, evenly spread."""
    if len(matrix) <= most:
        return matrix
    return matrix[np.linspace(0, len(matrix) - 1, most).round().astype(int)]
