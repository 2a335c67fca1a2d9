"""Ranges of what linear layers are given and caches keep while prompts go through a plan.

    rows of a layer ──▶ largest |x| per channel, histogram        every row, as it comes
                   └──▶ an even share of the rows, all kinds      kept until the layer is done
    weights         ──▶ factors searched, errors and sensitivities measured; rows freed

Ranges of the stages' own rows are what a bundle runs on: the middle sees few visual rows and text,
the end text alone. Rows of the prefix, which bundles compute in float, do not count for layers, but
they do for caches: they are stored in the same tensor under the same scale, however they were
computed, and the first token's keys are often the largest of all. Memory is bounded: one layer's
weights, one layer's kept rows, and the rows of all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
from torch import Tensor

from ...compile.build_spec import versions
from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.quantize.calibration_file import Calibration, RowsSeen, SampleFacts
from ...compile.quantize.group_ranges import GroupRanges, best_observer
from ...compile.quantize.int_arithmetic import activation_scale
from ...graphs.config import ModelConfig
from ...graphs.errors import ModelError
from ...graphs.linears import Group, linear_groups
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from ...graphs.progress import Advance, Progress, no_advance
from ...graphs.quantization import OBSERVERS, Observer
from ..sample_prompts import SamplePrompt, order_hash
from .layerwise import LayerObserver, layerwise_pieces, run_layerwise
from .observers import Histogram, threshold
from .smoothing import (
    SAMPLE_OUTPUTS,
    SAMPLE_ROWS,
    OutputSample,
    evenly,
    search_awq,
    search_smoothing,
)

ROWS_KEPT = 4096
"""Rows that are kept of one group at most: 180 MB of 11008 channels."""


class Collected(NamedTuple):
    """Ranges that a run measured.

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
    advance: Advance = no_advance,
) -> Collected:
    """Measure the ranges of every group of linear layers and of every cache.

    Args:
        checkpoint: weights of any type; computed in FP32.
        prompts: at least one with an image.
        plan: static; its stages see the rows.
        prefix_ids: token ids before every image, whose rows bundles compute in float.
        rows: ``dense`` measures the unpruned model's rows instead of the plan's.
        include_prefix: run the prefix too, and let its rows count for linear layers.
        advance: called with each of the pieces that ``run_layerwise`` reads.

    Raises:
        ModelError: a layer is given NaN or infinity.
        PlanError, PromptError, CapacityError: as ``run_layerwise``.
    """
    config = checkpoint.config
    if rows == "dense":
        plan = preset("dense", config.text.layers, config.visual_tokens)
    collector = Collector(config)
    run_layerwise(
        checkpoint,
        prompts,
        plan,
        () if include_prefix else prefix_ids,
        observer=collector,
        advance=advance,
    )
    return Collected(collector.ranges(), collector.cache)


def plan_alone(
    checkpoint: Checkpoint,
    fits: Mapping[str, str],
    prompts: Sequence[SamplePrompt],
    plan: StagePlan,
) -> Calibration:
    """Return a calibration that holds a plan and no ranges, for precisions that need none."""
    return Calibration(
        model=checkpoint.name,
        fits=fits,
        plan=plan,
        rows="stage",
        include_prefix=False,
        samples=SampleFacts((), tuple(prompt.name for prompt in prompts), order_hash(prompts)),
        groups={},
        versions=versions(),
        cache=None,
    )


def calibrated_ranges(
    checkpoint: Checkpoint,
    fits: Mapping[str, str],
    prompts: Sequence[SamplePrompt],
    plan: StagePlan,
    prefix_ids: Sequence[int],
    *,
    rows: RowsSeen = "stage",
    progress: Progress,
) -> Calibration:
    """Measure ranges as one step of ``progress``, and return a calibration that holds them alone.

    Arguments and errors are those of ``collect``; ``fits`` are the facts of the checkpoint.
    """
    name = "ranges" if rows == "stage" else f"{rows} ranges"
    with progress.step(name, layerwise_pieces(checkpoint.config, prefix_ids)) as outcome:
        found = collect(checkpoint, prompts, plan, prefix_ids, rows=rows, advance=progress.advance)
        groups, heads = len(found.groups), found.cache[0].size
        outcome.append(f"{groups} groups of linear layers, {heads} cached heads")
    bare = plan_alone(checkpoint, fits, prompts, plan)
    return replace(bare, rows=rows, groups=found.groups, cache=found.cache)


class Collector(LayerObserver):
    """An observer that measures each group as soon as its piece is done.

    Attributes:
        cache: (2, L, G) FP32, the largest absolute key and value of each layer and head.
    """

    def __init__(self, config: ModelConfig, rows_kept: int = ROWS_KEPT):
        self.rows_kept = rows_kept
        self.cache = np.zeros((2, config.text.layers, config.text.kv_heads), np.float32)
        self._groups = {group.name: group for group in linear_groups(config)}
        self._group_of = {
            linear: name for name, group in self._groups.items() for linear in group.linears
        }
        self._chosen: list[np.ndarray] = []
        self._call = -1
        self._open: dict[str, _Inputs] = {}
        self._done: dict[str, _Measured] = {}

    def enter(self, kinds: Sequence[np.ndarray]) -> None:
        """Choose the rows to keep."""
        self._chosen, self._call = chosen_rows(kinds, self.rows_kept), -1
        for inputs in self._open.values():  # of a layer that the piece before began
            inputs.go_on(self._room)

    @property
    def _room(self) -> int:
        return sum(map(len, self._chosen))

    def call(self) -> None:
        """Count the call."""
        self._call += 1

    def given(self, linear: str, rows: Tensor, out: Tensor) -> None:
        """Take the inputs of the first layer of a group in a call; the others get the same."""
        name = self._group_of.get(linear)
        if name is None:
            return
        if name not in self._open:
            self._open[name] = _Inputs(name, rows.shape[1], self._room)
        inputs = self._open[name]
        if inputs.call < self._call:
            inputs.call = self._call
            inputs.add(rows.numpy(), self._chosen[self._call])

    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """Measure the groups of which this piece has all layers; others go on in the next."""
        for name in list(self._open):
            group = self._groups[name]
            if all(f"{linear}.weight" in weights for linear in group.linears):
                layers = {linear: weights[f"{linear}.weight"].numpy() for linear in group.linears}
                self._done[name] = _measured(group, self._open.pop(name), layers)

    def cached(self, layer: int, keys: Tensor, values: Tensor | None) -> None:
        """Take one prompt's cache of a layer into account.

        Raises:
            ModelError: it holds NaN or infinity.
        """
        for of, what, rows in zip(self.cache, ("key", "value"), (keys, values), strict=True):
            if rows is None:
                continue
            found = rows.abs().amax((1, 2)).numpy()
            if not np.isfinite(found).all():
                raise ModelError(
                    f"a {what} of layer {layer} is NaN or infinity, expected finite numbers only. "
                    "Check the checkpoint, and the samples that it was run on."
                )
            np.maximum(of[layer], found, out=of[layer])

    def ranges(self) -> dict[str, GroupRanges]:
        """Return the ranges of all groups that were seen; sensitivities under the best observer."""
        best = best_observer(done.ranges for done in self._done.values())
        return {name: self._done[name].under(best) for name in self._groups if name in self._done}


def chosen_rows(kinds: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """Choose rows of each call to keep: at most ``most`` in all, each kind evenly.

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
    ends = np.cumsum([len(call) for call in kinds])[:-1]
    return [np.flatnonzero(part) for part in np.split(keep, ends)]


class _Inputs:
    """The inputs of one group so far, up to a call."""

    def __init__(self, name: str, width: int, kept: int):
        self.rows = self._filled = 0
        self.call = -1
        self.absmax = np.zeros(width, np.float32)
        self.total = np.zeros(width, np.float64)  # of |x|
        self.histogram = Histogram(f"the input of {name}")
        self._kept = np.empty((kept, width), np.float32)

    @property
    def kept(self) -> np.ndarray:
        """Rows (n, K) that were chosen."""
        return self._kept[: self._filled]

    def go_on(self, more: int) -> None:
        """Make room for what is kept of another piece, whose calls are counted anew."""
        new = np.empty((more, self._kept.shape[1]), np.float32)
        self._kept, self.call = np.concatenate((self.kept, new)), -1

    def add(self, rows: np.ndarray, chosen: np.ndarray) -> None:
        """Take rows (Q, K), of which ``chosen`` are kept."""
        self.histogram.add(rows)
        size = np.abs(rows)
        np.maximum(self.absmax, size.max(0), out=self.absmax)
        self.total += size.sum(0, dtype=np.float64)
        stop = self._filled + len(chosen)
        self._kept[self._filled : stop] = rows[chosen]
        self.rows, self._filled = self.rows + len(rows), stop


@dataclass(frozen=True)
class _Measured:
    """Ranges of a group, and the W8A8 error of each of its layers by observer, smoothed."""

    ranges: GroupRanges
    errors: Mapping[str, Mapping[str, float]]

    def under(self, observer: str) -> GroupRanges:
        """Return the ranges, sensitivities completed for one observer."""
        complete = {
            linear: {"w8a8": self.errors[linear][observer], **others}
            for linear, others in self.ranges.sensitivity.items()
        }
        return replace(self.ranges, sensitivity=complete)


def _measured(group: Group, inputs: _Inputs, weights: Mapping[str, np.ndarray]) -> _Measured:
    """Measure one group; ``weights`` (N, K) by layer."""
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
    samples = {linear: OutputSample.of(some, [weight]) for linear, weight in each.items()}
    errors = {linear: _errors(sample, plain) for linear, sample in samples.items()}
    after = errors
    if alpha is not None:
        after = {
            linear: _errors(OutputSample.of(some / factors, [weight * factors]), smoothed)
            for linear, weight in each.items()
        }
    careful = {
        linear: OutputSample.of(some / aware, [weight * aware]).error_w4()
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
        weight_error=float(np.mean([sample.error_w4() for sample in samples.values()])),
        aware_error=float(np.mean(list(careful.values()))),
        sensitivity={
            linear: {"w8": sample.error_w8(), "w4": careful[linear]}
            for linear, sample in samples.items()
        },
    )
    return _Measured(ranges, after)


def _smoothed(inputs: _Inputs, factors: np.ndarray, name: str) -> dict[str, float]:
    """Return thresholds of the inputs divided by ``factors``; the largest is that of all rows."""
    histogram = Histogram(f"the smoothed input of {name}")
    for start in range(0, len(inputs.kept), SAMPLE_ROWS):
        histogram.add(inputs.kept[start : start + SAMPLE_ROWS] / factors)
    return {**_thresholds(histogram), "minmax": float((inputs.absmax / factors).max())}


def _thresholds(histogram: Histogram) -> dict[str, float]:
    """Return the threshold of every observer."""
    return {name: threshold(histogram, name) for name in get_args(Observer)}


def _errors(sample: OutputSample, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the W8A8 error of one layer by observer."""
    return {
        observer: sample.error_w8a8(activation_scale(limit))
        for observer, limit in thresholds.items()
    }


def _mean(errors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over layers, by observer."""
    return {name: float(np.mean([each[name] for each in errors.values()])) for name in OBSERVERS}
