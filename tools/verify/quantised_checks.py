"""Rounded weights against the checkpoint's, as far as a bundle tells: every number of them.

    checkpoint ──▶ x factors of its inputs, / factors of its outputs ──▶ what was rounded

Factors of smoothing stand nowhere in a bundle. They show in what took them: a norm that is smaller
than the checkpoint's, or the scales of ``up_proj``. The layers behind must bear the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.quantize.int_arithmetic import (
    HALF_TINY,
    INT4_LEVELS,
    INT8_LEVELS,
    TINY,
    absmax,
    restored,
)
from ...graphs.bundle import Manifest
from ...graphs.linears import Group, linear_groups
from ...graphs.modules.quantized import INPUT_SCALE, SCALE, WEIGHT
from ...graphs.quantization import SCALE_BLOCK

LEVELS = {"w8a8": INT8_LEVELS, "w8": INT8_LEVELS, "w4": INT4_LEVELS}

FOLD_SLACK = {"float32": 2.0**-20, "float16": 3 * 2.0**-11}
"""Relative error of a number that was folded, divided out and stored in a type."""


class WrongError(Exception):
    """A weight is not what the checkpoint's becomes; says which, and how."""


@dataclass(frozen=True)
class Factors:
    """What divides a group's inputs (K,); 1: nothing does, NaN: the bundle does not tell."""

    values: np.ndarray
    slack: np.ndarray  # relative error of each

    @property
    def known(self) -> np.ndarray:
        """Which of them the bundle tells, (K,) bool."""
        return np.isfinite(self.values)


@dataclass
class QuantisedWeights:
    """Checks of one bundle's quantised or smoothed layers, one layer in memory at a time.

    Attributes:
        weights: arrays of the graph files, by name.
        layers: how many were checked, by scheme; ``float`` are those with factors alone.
        worst: largest error found, in half steps.
        hidden: channels whose factor the bundle does not tell.
    """

    manifest: Manifest
    checkpoint: Checkpoint
    weights: Mapping[str, np.ndarray]
    layers: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    hidden: int = 0

    def __post_init__(self) -> None:
        self.half = self.manifest.dtype == "float16"
        self.slack = FOLD_SLACK[self.manifest.dtype]
        self.groups = linear_groups(self.manifest.config)
        self.schemes = self.manifest.quantization.schemes
        self.outputs: dict[str, Factors] = {}  # of modules, what divides what they put out

    def check(self) -> None:
        """Every group.

        Raises:
            WrongError: the first weight that is wrong.
        """
        self.outputs = {}
        inputs = {group.name: Factors(*_ones(group.inputs)) for group in self.groups}
        for group in self.groups:  # a fold comes before what reads it
            if group.name in self.manifest.quantization.smoothed:
                assert group.fold is not None
                fold = next((one for one in self.groups if group.fold in one.linears), None)
                if fold is None:
                    found = self._norm_factors(group.fold)
                else:
                    found = self._linear_factors(group.fold, inputs[fold.name])
                inputs[group.name] = self.outputs[group.fold] = found
                self.hidden += int((~found.known).sum())
        for group in self.groups:
            self._scales_agree(group)
            for linear in group.linears:
                smoothed = group.name in self.manifest.quantization.smoothed
                if linear in self.schemes or smoothed or linear in self.outputs:
                    self._check_layer(linear, inputs[group.name])
                    self.checkpoint.release()

    def touches(self, name: str) -> bool:
        """Whether the tensor ``name`` is checked here rather than bit for bit."""
        module, _, own = name.rpartition(".")
        if module in self.schemes and own != "bias":
            return True
        smoothed = self.manifest.quantization.smoothed
        groups = [group for group in self.groups if group.name in smoothed]
        columns = any(module in group.linears for group in groups)
        return any(module == group.fold for group in groups) or (columns and own == "weight")

    def _norm_factors(self, norm: str) -> Factors:
        """By how much the bundle's norm is smaller than the checkpoint's."""
        ours, theirs = self._ours(f"{norm}.weight"), self._theirs(f"{norm}.weight")
        with np.errstate(divide="ignore", invalid="ignore"):
            values = theirs / ours
            tiny = HALF_TINY * 2.0**-11 / np.abs(ours) if self.half else 0.0
        dead = (ours == 0) | (theirs == 0)
        _require_positive(f"{norm}.weight", values[~dead])
        values[dead] = np.nan
        factors = Factors(values, self.slack + np.nan_to_num(tiny, posinf=0.0))
        if f"{norm}.bias" in self.weights:
            want = self._theirs(f"{norm}.bias") / values
            self._require_near(f"{norm}.bias", self._ours(f"{norm}.bias"), want, factors.slack)
        return factors

    def _linear_factors(self, linear: str, inputs: Factors) -> Factors:
        """What the rows of a layer were divided by: its scales, or its weights, are smaller."""
        plain = self._theirs(f"{linear}.weight") * inputs.values
        scheme = self.schemes.get(linear)
        if not inputs.known.all():
            return Factors(np.full(len(plain), np.nan), np.zeros(len(plain)))
        if scheme is None:
            at = np.abs(plain).argmax(1)[:, None]
            ours = self._ours(f"{linear}.weight")
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.take_along_axis(plain, at, 1) / np.take_along_axis(ours, at, 1)
            values = ratio[:, 0]
        else:
            stored = self._ours(f"{linear}.{SCALE}")
            largest, scales = _absmax(plain, stored), stored.reshape(-1, len(plain)).T
            ratio = largest / (LEVELS[scheme] * scales)
            usable = (largest > 0) & (scales > self._tiny * 1.5)
            values = np.nanmax(np.where(usable, ratio, np.nan), 1, initial=-np.inf)
        values = np.where(np.isfinite(values) & (np.abs(plain).max(1) > 0), values, np.nan)
        found = values[np.isfinite(values)]
        _require_positive(f"{linear}.{SCALE}" if scheme else f"{linear}.weight", found)
        return Factors(values, np.full(len(values), 2 * self.slack))

    def _check_layer(self, linear: str, inputs: Factors) -> None:
        """One layer's weight and bias."""
        scheme = self.schemes.get(linear)
        outputs = self.outputs.get(linear) or Factors(*_ones(self._rows(linear)))
        want = self._theirs(f"{linear}.weight") * inputs.values / outputs.values[:, None]
        slack = np.abs(want) * (self.slack + inputs.slack + outputs.slack[:, None])
        if scheme is None:
            ours = self._ours(f"{linear}.weight")
            if not np.isfinite(ours).all():
                raise WrongError(f"{linear}.weight is not finite")
            _require_within(f"{linear}.weight", np.abs(ours - want), slack, "what was folded in")
        else:
            self._check_quantised(linear, scheme, want, slack, exact=linear not in self.outputs)
        if linear in self.outputs and f"{linear}.bias" in self.weights:
            bias = self._theirs(f"{linear}.bias") / outputs.values
            self._require_near(f"{linear}.bias", self._ours(f"{linear}.bias"), bias, outputs.slack)
        kind = scheme or "float"
        self.layers[kind] = self.layers.get(kind, 0) + 1

    def _check_quantised(
        self, linear: str, scheme: str, want: np.ndarray, slack: np.ndarray, *, exact: bool
    ) -> None:
        """Integers and scales of a layer whose weight (N, K) is ``want``, give or take ``slack``.

        ``exact``: scales are not what ``want`` was inferred from.
        """
        levels, name = LEVELS[scheme], f"{linear}.{WEIGHT[scheme]}"
        values, scales = self.weights[name], self._ours(f"{linear}.{SCALE}")
        _require_positive(f"{linear}.{SCALE}", scales)
        if int(np.abs(values.astype(np.int16)).max(initial=0)) > levels:
            raise WrongError(f"{name} holds integers beyond ±{levels}")
        block = SCALE_BLOCK if scales.ndim == 2 else None
        known = np.isfinite(want)
        if exact and known.all():
            largest = _absmax(want, scales)
            filled = np.where(largest == 0, 1.0, np.maximum(largest / levels, self._tiny))
            found = scales.reshape(-1, len(want)).T
            allowed = (_absmax(slack, scales) / levels) + filled * self.slack
            _require_within(f"{linear}.{SCALE}", np.abs(found - filled), allowed, "its share")
        error = np.abs(restored(values, scales, block) - want)
        step = restored(np.ones_like(values), scales, block)
        within = np.where(known, error / (0.5 * step + slack), 0.0)
        self.worst = max(self.worst, float(np.where(known, error / (0.5 * step), 0.0).max()))
        if not float(within.max()) <= 1 + 2.0**-10:
            at = np.unravel_index(int(within.argmax()), within.shape)
            raise WrongError(
                f"{name}: the weight of input {at[1]} and output {at[0]} is off by "
                f"{error[at] / step[at]:.2g} steps, expected at most half of one"
            )

    def _scales_agree(self, group: Group) -> None:
        """Layers of one input round it alike: their scales differ in the last bits at most."""
        names = [f"{linear}.{INPUT_SCALE}" for linear in group.linears]
        scales = {name: self._ours(name) for name in names if name in self.weights}
        for name, scale in scales.items():
            _require_positive(name, scale)
            first = next(iter(scales.values()))
            if abs(float(scale / first) - 1) > self.slack:
                raise WrongError(
                    f"{name} is {float(scale):.4g}, that of the same input in "
                    f"{group.name} is {float(first):.4g}"
                )

    def _require_near(
        self, name: str, ours: np.ndarray, want: np.ndarray, slack: np.ndarray
    ) -> None:
        smallest = HALF_TINY if self.half else TINY
        allowed = np.abs(want) * (self.slack + slack) + smallest * 2.0**-10
        _require_within(name, np.abs(ours - want), allowed, "what was folded in")

    @property
    def _tiny(self) -> float:
        return HALF_TINY if self.half else TINY

    def _rows(self, linear: str) -> int:
        return self.checkpoint.tensors[f"{linear}.weight"].shape[0]

    def _ours(self, name: str) -> np.ndarray:
        return self.weights[name].astype(np.float32)

    def _theirs(self, name: str) -> np.ndarray:
        return self.checkpoint.load(name).float().numpy()


def _ones(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors that change nothing, exactly."""
    return np.ones(count, np.float32), np.zeros(count, np.float32)


def _absmax(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(N, K) -> (N, blocks): the largest absolute value that each of ``scales`` stands for."""
    if scales.ndim == 1:
        return absmax(weight, 1)[:, None]
    starts = range(0, weight.shape[1], SCALE_BLOCK)
    return np.stack([absmax(weight[:, at : at + SCALE_BLOCK], 1) for at in starts], 1)


def _require_positive(name: str, values: np.ndarray) -> None:
    if not (np.isfinite(values) & (values > 0)).all():
        raise WrongError(f"{name} holds what is not above 0 or not finite")


def _require_within(name: str, error: np.ndarray, allowed: np.ndarray, what: str) -> None:
    over = np.nan_to_num(error - allowed, nan=0.0)
    if over.max(initial=0.0) > 0:
        at = np.unravel_index(int(over.argmax()), over.shape)
        where = list(map(int, at))
        raise WrongError(
            f"{name} at {where} is off by {float(error[at]):.2g} from {what}, expected at most "
            f"{float(allowed[at]):.2g}"
        )
