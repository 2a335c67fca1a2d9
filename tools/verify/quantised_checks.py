"""Rounded weights against the checkpoint's, as far as a bundle alone tells: every number of them.

    checkpoint ──▶ x factors of its inputs, / factors of its outputs ──▶ what was rounded

A bundle does not hold the factors of smoothing. They show in the module that took them: a norm
smaller than the checkpoint's, or the scales of ``up_proj``. The layers behind must bear the same.
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
from ...graphs.quantization import Scheme, block_of
from ...graphs.targets import find_target

LEVELS = {"w8a8": INT8_LEVELS, "w8": INT8_LEVELS, "w4": INT4_LEVELS}

FOLD_SLACK = {"float32": 2.0**-20, "float16": 3 * 2.0**-11}
"""Relative error of a number that was folded, divided out and stored in a type."""


class WrongError(Exception):
    """A weight that is not what the checkpoint's becomes; says which, and how."""


@dataclass(frozen=True)
class Factors:
    """Divisors of a module's inputs or outputs (K,), and the relative error of each; NaN where the
    bundle does not tell.
    """

    values: np.ndarray
    slack: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Mask (K,) of those that the bundle tells."""
        return np.isfinite(self.values)


ONES = Factors(np.ones(1, np.float32), np.zeros(1, np.float32))
"""Factors of a module that was not smoothed, of any width."""


@dataclass
class QuantisedWeights:
    """Checks of one bundle's quantised or smoothed layers, one layer in memory at a time.

    Attributes:
        weights: arrays of the graph files, by name.
        layers: number of layers checked, by scheme; ``float`` are those with factors alone.
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
        self.slack = FOLD_SLACK[self.manifest.dtype]
        self.tiny = HALF_TINY if self.manifest.dtype == "float16" else TINY
        self.schemes = self.manifest.quantization.schemes
        self.decode = self.manifest.quantization.decode
        self.groups = linear_groups(self.manifest.config, self.manifest.plan.dropped)
        smoothed = self.manifest.quantization.smoothed
        self.smoothed = [group for group in self.groups if group.name in smoothed]
        self.columns = {linear for group in self.smoothed for linear in group.linears}
        self.inputs: dict[str, Factors] = {}  # by linear layer
        self.outputs: dict[str, Factors] = {}  # by module

    def touches(self, name: str) -> bool:
        """Return whether the tensor ``name`` is checked here rather than bit for bit."""
        module, _, own = name.rpartition(".")
        return (
            (module in self.schemes and own != "bias")
            or any(module == group.fold for group in self.smoothed)
            or (module in self.columns and own == "weight")
        )

    def check(self) -> None:
        """Check every group.

        Raises:
            WrongError: the first weight that is wrong.
        """
        linears = {linear for group in self.groups for linear in group.linears}
        for group in self.smoothed:  # a fold comes before the layers that read it
            assert group.fold is not None
            infer = self._linear_factors if group.fold in linears else self._norm_factors
            found = self.outputs[group.fold] = infer(group.fold)
            self.inputs |= dict.fromkeys(group.linears, found)
            self.hidden += int((~found.known).sum())
        for group in self.groups:
            self._scales_agree(group)
            for linear in group.linears:
                if linear in self.schemes or linear in self.columns or linear in self.outputs:
                    self._check_layer(linear)
                    self.checkpoint.release()

    def _norm_factors(self, norm: str) -> Factors:
        """Infer factors from a norm that is smaller than the checkpoint's."""
        ours, theirs = self._ours(f"{norm}.weight"), self._theirs(f"{norm}.weight")
        half = self.manifest.dtype == "float16"
        with np.errstate(divide="ignore", invalid="ignore"):
            values = theirs / ours
            rounding = HALF_TINY * 2.0**-11 / np.abs(ours) if half else 0.0
        dead = (ours == 0) | (theirs == 0)
        _require_positive(f"{norm}.weight", values[~dead])
        values[dead] = np.nan
        factors = Factors(values, self.slack + np.nan_to_num(rounding, posinf=0.0))
        self._check_bias(norm, factors)
        return factors

    def _linear_factors(self, linear: str) -> Factors:
        """Infer factors from the rows of a layer: its scales, or its weights, are smaller."""
        inputs = self.inputs.get(linear, ONES)
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
            stored = self._ours(f"{linear}.{SCALE[scheme]}")
            largest = _absmax(plain, self._block(scheme, plain))
            scales = stored.reshape(-1, len(plain)).T
            ratio = largest / (LEVELS[scheme] * scales)
            usable = (largest > 0) & (scales > self.tiny * 1.5)
            values = np.nanmax(np.where(usable, ratio, np.nan), 1, initial=-np.inf)
        values = np.where(np.isfinite(values) & (np.abs(plain).max(1) > 0), values, np.nan)
        own = SCALE[scheme] if scheme else "weight"
        _require_positive(f"{linear}.{own}", values[np.isfinite(values)])
        return Factors(values, np.full(len(values), 2 * self.slack))

    def _check_layer(self, linear: str) -> None:
        """Check one layer's weight and bias."""
        scheme, name = self.schemes.get(linear), f"{linear}.weight"
        inputs = self.inputs.get(linear, ONES)
        outputs = self.outputs.get(linear, ONES)
        want = self._theirs(name) * inputs.values / outputs.values[:, None]
        slack = np.abs(want) * (self.slack + inputs.slack + outputs.slack[:, None])
        if scheme is None:
            ours = self._ours(name)
            if not np.isfinite(ours).all():
                raise WrongError(f"{name} is not finite")
            _require_within(name, np.abs(ours - want), slack, "what was folded in")
        else:
            for own in dict.fromkeys((scheme, self.decode.get(linear, scheme))):
                self._check_quantised(linear, own, want, slack)
        if linear in self.outputs:
            self._check_bias(linear, outputs)
        kind = scheme or "float"
        self.layers[kind] = self.layers.get(kind, 0) + 1

    def _check_quantised(
        self, linear: str, scheme: Scheme, want: np.ndarray, slack: np.ndarray
    ) -> None:
        """Check integers and scales of a layer whose weight (N, K) is ``want`` within ``slack``."""
        levels, name = LEVELS[scheme], f"{linear}.{WEIGHT[scheme]}"
        scale = f"{linear}.{SCALE[scheme]}"
        values, scales = self.weights[name], self._ours(scale)
        _require_positive(scale, scales)
        if int(np.abs(values.astype(np.int16)).max(initial=0)) > levels:
            raise WrongError(f"{name} holds integers beyond ±{levels}")
        block = self._block(scheme, want)
        known = np.isfinite(want)
        if linear not in self.outputs and known.all():  # else ``want`` was inferred from the scales
            largest = _absmax(want, block)
            filled = np.where(largest == 0, 1.0, np.maximum(largest / levels, self.tiny))
            found = scales.reshape(-1, len(want)).T
            allowed = (_absmax(slack, block) / levels) + filled * self.slack
            _require_within(scale, np.abs(found - filled), allowed, "its share")
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
        """Make sure that scales of one input differ in their last bits at most."""
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

    def _check_bias(self, module: str, factors: Factors) -> None:
        """Check the bias of a module that was divided by ``factors``, where it has one."""
        name = f"{module}.bias"
        if name in self.weights:
            want = self._theirs(name) / factors.values
            allowed = np.abs(want) * (self.slack + factors.slack) + self.tiny * 2.0**-10
            _require_within(name, np.abs(self._ours(name) - want), allowed, "what was folded in")

    def _block(self, scheme: Scheme, weight: np.ndarray) -> int | None:
        """Return how many inputs of a weight (N, K) share a scale; None: all."""
        engines = find_target(self.manifest.target).engines
        return block_of(scheme, weight.shape[1], engines=engines)

    def _ours(self, name: str) -> np.ndarray:
        return self.weights[name].astype(np.float32)

    def _theirs(self, name: str) -> np.ndarray:
        return self.checkpoint.load(name).float().numpy()


def _absmax(weight: np.ndarray, block: int | None) -> np.ndarray:
    """(N, K) -> (N, blocks): the largest absolute value that each scale stands for."""
    if block is None:
        return absmax(weight, 1)[:, None]
    starts = range(0, weight.shape[1], block)
    return np.stack([absmax(weight[:, at : at + block], 1) for at in starts], 1)


def _require_positive(name: str, values: np.ndarray) -> None:
    if not (np.isfinite(values) & (values > 0)).all():
        raise WrongError(f"{name} holds what is not above 0 or not finite")


def _require_within(name: str, error: np.ndarray, allowed: np.ndarray, what: str) -> None:
    over = np.nan_to_num(error - allowed, nan=0.0)
    if over.max(initial=0.0) > 0:
        at = np.unravel_index(int(over.argmax()), over.shape)
        raise WrongError(
            f"{name} at {list(map(int, at))} is off by {float(error[at]):.2g} from {what}, "
            f"expected at most {float(allowed[at]):.2g}"
        )
