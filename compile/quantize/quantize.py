"""Integers from a recipe and a calibration: which layer takes which scheme, and their bytes.

    recipe + calibration ──▶ Quantization (a scheme for every linear layer) ──▶ QuantisedTensors

Smoothing is exact: what divides a group's inputs per channel is folded into the module before them,
what multiplies it back into their weights, before anything is rounded (SmoothQuant, arXiv
2211.10438, section 4; for weights alone AWQ, arXiv 2306.00978, section 3.2).

    calibration ──▶ (2, L, G) scales ──▶ cache_scales.bin ◀── every graph, and the runtime
                                    └──▶ prefix.bin, INT8

A cache has one scale for each layer and head, keys and values apart, from the largest value that
calibration saw: clipping a key moves a token's attention wherever it is looked at again, and
rounding to 255 steps of the whole range was measured to change no answer (docs/quantisation.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...graphs.bundle import TensorRef
from ...graphs.commands import visistage
from ...graphs.config import ModelConfig
from ...graphs.errors import DataError, TargetError, nearest
from ...graphs.linears import (
    ATTENTION_OUTPUT,
    MLP_OUTPUT,
    Group,
    decoder_module,
    linear_groups,
)
from ...graphs.modules.ops import Eager
from ...graphs.modules.quantized import (
    INPUT_SCALE,
    SCALE,
    WEIGHT,
    ZERO,
    cache_scale_names,
    scale_shape,
)
from ...graphs.plan.plan import StagePlan
from ...graphs.precision import SAFE_MAX, Fp32Fallback
from ...graphs.quantization import QuantConfig, Quantization, Scheme, block_of
from ...graphs.targets import TARGETS, Target
from ...graphs.text_config import TextConfig
from ..checkpoint.checkpoint import Checkpoint
from ..export.export import WeightSpan
from .calibration_file import Calibration
from .group_ranges import GroupRanges
from .int_arithmetic import (
    INT4_LEVELS,
    INT8_LEVELS,
    activation_scale,
    blocked_weight,
    int8_weight,
    pack_int4,
    scales_of,
)

CALIBRATIONS = Path("calibrations")
"""Folder where ``visistage calibrate`` puts them, and where a build looks first."""

CACHE_SCALES_FILE = "cache_scales.bin"

DECODE_ERROR = 0.05
"""Relative squared error of a layer's output beyond which it keeps its W8A8 weight for one row:
four bits lose some 0.01 of Gaussian weights, and more where few inputs, massive ones, carry most of
the sum."""


def resolve(
    quant_config: QuantConfig,
    calibration: Calibration | None,
    config: ModelConfig,
    plan: StagePlan,
    target: Target,
) -> Quantization:
    """Choose the scheme of every linear layer, checked against plan, target and calibration.

    Raises:
        TargetError: an option that cannot be honoured for this plan or target.
        DataError: what the recipe asks for needs a calibration, or another one.
    """
    _check(quant_config, plan, target)
    groups = linear_groups(config, plan.dropped)
    schemes: dict[str, Scheme] = {}
    for group in groups:
        scheme = quant_config.scheme_of(group, plan, target.schemes)
        if scheme != "float":
            schemes |= dict.fromkeys(group.linears, scheme)
    quantised_inputs = "w8a8" in schemes.values()
    quantises_cache = quant_config.cache == "int8"
    needs = {
        f"'{quant_config.base}' rounds inputs": quantised_inputs,
        "cache=int8 rounds keys": quantises_cache,
        "keep= ranks layers": quant_config.keep,
    }
    need = next((reason for reason, wanted in needs.items() if wanted), None)
    if calibration is None and need is not None:
        raise DataError(
            f"precision {need}, which takes a calibration. Make one: visistage calibrate MODEL "
            f"--precision {quant_config.base}; or name it: --calib DIR. Looked in {CALIBRATIONS}/"
        )
    if quantises_cache and calibration is not None and calibration.cache is None:
        raise DataError(
            f"precision {quant_config.name} rounds keys and values, and the calibration of "
            f"'{calibration.model}' is from a version that did not measure them. Calibrate again: "
            f"{visistage('calibrate', calibration.model, plan=calibration.plan.name)}; or leave "
            "out cache=int8"
        )
    for name in kept_float(quant_config, schemes, calibration):
        del schemes[name]
    smoothed = {}
    if calibration is not None and quant_config.smooth:
        half = target.dtype(quant_config.base) == "float16"
        for group in groups:
            alpha = _alpha(group, schemes, calibration.groups[group.name], half)
            if alpha is not None:
                smoothed[group.name] = alpha
    observer: str | None = quant_config.observer
    if calibration is not None and quantised_inputs:
        observer = observer or calibration.best_observer
    return Quantization(
        recipe=quant_config.name,
        calibration=calibration.hash if calibration else None,
        observer=observer if quantised_inputs else None,
        schemes=schemes,
        decode=_decode_schemes(quant_config, schemes, groups, calibration),
        smoothed=smoothed,
        cache=quant_config.cache,
    )


def _decode_schemes(
    quant_config: QuantConfig,
    schemes: Mapping[str, Scheme],
    groups: Sequence[Group],
    calibration: Calibration | None,
) -> dict[str, Scheme]:
    """Return the schemes for one row: those for many, but ``decode``'s instead of W8A8, unless that
    changes what a layer returns by more than ``DECODE_ERROR``.
    """
    if quant_config.decode is None:
        return {}
    assert calibration is not None  # W8A8 takes one
    found = dict(schemes)
    for group in groups:
        for name in group.linears:
            errors = calibration.groups[group.name].sensitivity[name]
            if group.place == "decoder" and schemes.get(name) == "w8a8":
                loud = errors[quant_config.decode] > DECODE_ERROR
                found[name] = "w8a8" if loud else quant_config.decode
    return found


def check_sizes(calibration: Calibration, config: ModelConfig) -> None:
    """Refuse a calibration of a model of another size, before ``check_fits`` reads every weight.

    Raises:
        DataError: names the ranges that do not fit.
    """
    text, plan = config.text, calibration.plan
    found = {name: ranges.absmax.shape for name, ranges in calibration.groups.items()}
    wrong = [  # one with a plan alone has no ranges
        group.name
        for group in linear_groups(config, plan.dropped)
        if found and found.get(group.name) != (group.inputs,)
    ]
    if calibration.cache is not None and calibration.cache.shape != (2, text.layers, text.kv_heads):
        wrong.append("the cache")
    if (plan.layers, plan.visual_tokens) != (text.layers, config.visual_tokens):
        wrong.append("the plan")
    if wrong:
        raise DataError(
            f"the calibration of '{calibration.model}' does not fit: it was made for a model of "
            f"another size, in {wrong[0]}. Calibrate what you build: visistage calibrate MODEL "
            "--data DIR"
        )


def input_shifts(fallback: Fp32Fallback) -> dict[str, int]:
    """Return exponents by which inputs come scaled, by the name of the layer that reads them."""
    blocks = ((MLP_OUTPUT, fallback.mlp_shift), (ATTENTION_OUTPUT, fallback.attention_shift))
    return {
        decoder_module(layer, name): shift
        for name, by_layer in blocks
        for layer, shift in by_layer.items()
    }


class QuantisedTensors:
    """Tensors that quantised graphs read instead of, or otherwise than, the checkpoint's.

    One linear layer is in memory at a time. ``shifts``: exponents by which a layer's input comes
    scaled (``precision.Fp32Fallback``), by the layer's name. ``half``: the graphs are FP16, so
    scales must be. ``engines`` as in ``quantized.replace_linears``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        calibration: Calibration | None,
        *,
        half: bool,
        engines: bool,
        shifts: Mapping[str, int] | None = None,
    ):
        self.checkpoint, self.quantization, self.calibration = checkpoint, quantization, calibration
        self.half, self.engines, self.shifts = half, engines, shifts or {}
        self.group_of: dict[str, Group] = {}
        self.columns: dict[str, np.ndarray] = {}  # factors (K,) of a linear layer's inputs
        self.outputs: dict[str, np.ndarray] = {}  # divisors of a module's output
        for group in linear_groups(checkpoint.config):
            self.group_of |= dict.fromkeys(group.linears, group)
            factors = self._factors(group)
            if factors is not None:
                assert group.fold is not None
                self.columns |= dict.fromkeys(group.linears, factors)
                self.outputs[group.fold] = factors
        self._last: tuple[tuple[str, Scheme], dict[str, np.ndarray]] = (("", "float"), {})

    def changes(self, name: str) -> bool:
        """Return whether the tensor ``name`` of a graph is made here rather than read as it is."""
        module, _, own = name.rpartition(".")
        if module in self.quantization.schemes and own != "bias":
            return True
        return module in self.outputs or (module in self.columns and own == "weight")

    def nbytes(self, name: str, itemsize: int) -> int:
        """Return the bytes that the tensor ``name`` takes; floats take ``itemsize``."""
        module, _, own = name.rpartition(".")
        weight = self.checkpoint.tensors[f"{module}.weight"].shape
        if own == WEIGHT["w4"]:
            return -(-math.prod(weight) // 2)
        if own == WEIGHT["w8"]:
            return math.prod(weight)
        if own == INPUT_SCALE:
            return itemsize
        if own in (*SCALE.values(), ZERO):
            outputs, inputs = weight
            block = block_of(self._scheme_of(module, own), inputs, engines=self.engines)
            size = 1 if own == ZERO else itemsize
            return math.prod(scale_shape(block, inputs, outputs)) * size
        return math.prod(self.checkpoint.tensors[name].shape) * itemsize

    def tensor(self, name: str) -> Tensor:
        """Return tensor ``name`` as the graphs read it: INT8, INT4 packed into bytes, or float."""
        module, _, own = name.rpartition(".")
        if own in ("weight", "bias"):
            return torch.from_numpy(self.folded(module, own))
        key = module, self._scheme_of(module, own)
        if self._last[0] != key:
            self._last = key, self._quantised(*key)
        return torch.from_numpy(self._last[1][own])

    def _scheme_of(self, module: str, own: str) -> Scheme:
        """Return the scheme to which a parameter of a quantised layer belongs."""
        if own in (WEIGHT["w4"], SCALE["w4"]):
            return "w4"
        return self.quantization.schemes[module]

    def _factors(self, group: Group) -> np.ndarray | None:
        if group.name not in self.quantization.smoothed:
            return None
        assert self.calibration is not None
        ranges = self.calibration.groups[group.name]
        return ranges.smoothing(_scheme(group, self.quantization.schemes))[1]

    def folded(self, module: str, own: str) -> np.ndarray:
        """Return a weight or bias (float32) with the factors of the modules around it."""
        values = self.checkpoint.load(f"{module}.{own}").float().numpy()
        if module in self.outputs:
            divisors = self.outputs[module]
            values = values / (divisors if values.ndim == 1 else divisors[:, None])
        if module in self.columns and own == "weight":
            values = values * self.columns[module]
        self.checkpoint.release()
        return values

    def _quantised(self, module: str, scheme: Scheme) -> dict[str, np.ndarray]:
        """Return every tensor of a quantised layer but its bias, by its own name."""
        weight = self.folded(module, "weight")
        block = block_of(scheme, weight.shape[1], engines=self.engines)
        if block is None:
            values, scales = int8_weight(weight, half=self.half, name=module)
        else:
            levels = INT4_LEVELS if scheme == "w4" else INT8_LEVELS
            values, scales = blocked_weight(
                weight, block, levels=levels, half=self.half, name=module
            )
        packed = pack_int4(values) if scheme == "w4" else values
        out = {WEIGHT[scheme]: packed, SCALE[scheme]: scales}
        if scheme == "w8" and block is not None:
            out[ZERO] = np.zeros(scales.shape, np.int8)
        if scheme == "w8a8":
            out[INPUT_SCALE] = np.asarray(self._input_scale(module))
        return out

    def _input_scale(self, module: str) -> np.float32:
        group, observer = self.group_of[module], self.quantization.observer
        assert self.calibration is not None
        assert observer is not None
        ranges = self.calibration.groups[group.name]
        smoothed = group.name in self.quantization.smoothed
        threshold = (ranges.smoothed_thresholds if smoothed else ranges.thresholds)[observer]
        scale = activation_scale(threshold * 2.0 ** -self.shifts.get(module, 0), half=self.half)
        if not self.engines:
            # Equal roundings would be merged into one, which ONNX Runtime does not fuse.
            for _ in range(group.linears.index(module)):
                scale = np.nextafter(scale, np.float32(np.inf))
        return scale


def calibrated_cache_scales(calibration: Calibration, *, half: bool) -> np.ndarray:
    """Return scales of keys and of values, (2, L, G) FP32; those of heads of zeros alone are 1.

    ``half``: FP16 numbers, as graphs in FP16 need them.
    """
    assert calibration.cache is not None  # ``quantize.resolve`` checks that
    return scales_of(calibration.cache, INT8_LEVELS, half=half, name="the cache's range")


def describe_scales(text: TextConfig, dtype: str) -> TensorRef:
    """Say where ``write_scales`` puts them, in graphs whose floats are of type ``dtype``."""
    return TensorRef(CACHE_SCALES_FILE, 0, dtype, (2, text.layers, text.kv_heads))


def scale_spans(text: TextConfig, dtype: str) -> dict[str, WeightSpan]:
    """Say the same for the graphs, by the names of their tensors."""
    nbytes = text.kv_heads * getattr(torch, dtype).itemsize
    return {
        name: WeightSpan(CACHE_SCALES_FILE, (number * text.layers + layer) * nbytes, nbytes)
        for layer in range(text.layers)
        for number, name in enumerate(cache_scale_names(layer))
    }


def write_scales(scales: np.ndarray, dtype: str, folder: Path) -> list[str]:
    """Write them in the graphs' type; return the file's name."""
    (folder / CACHE_SCALES_FILE).write_bytes(np.ascontiguousarray(scales, dtype).tobytes())
    return [CACHE_SCALES_FILE]


def quantised_rows(cache: Tensor, scales: np.ndarray) -> Tensor:
    """Round keys and values (2, L, G, P, d) FP32 to INT8, as the graphs cache them.

    The prefix is shipped so, and not rounded when a bundle is loaded: every runtime then copies the
    same bytes, and none has to know how graphs round.
    """
    assert math.prod(cache.shape[:3]) == scales.size
    ops = Eager()
    return torch.stack(
        [
            torch.stack([ops.stored(rows[None], scale)[0] for rows, scale in zip(*of, strict=True)])
            for of in zip(cache, torch.from_numpy(scales), strict=True)
        ]
    )


def _check(quant_config: QuantConfig, plan: StagePlan, target: Target) -> None:
    """Refuse stages that the plan has not, and schemes that the target does not run."""
    for stage in quant_config.stages:
        if stage >= len(plan.stages):
            raise TargetError(
                f"precision {quant_config.name} names stage{stage}, plan '{plan.name}' has "
                f"{len(plan.stages)} stages, counted from 0"
            )
    if quant_config.decode is not None and not (target.steps and quant_config.base == "int8"):
        able = ", ".join(name for name, other in TARGETS.items() if other.steps)
        raise TargetError(
            f"precision {quant_config.name} on target '{target.name}': decode= gives W8A8 layers "
            f"other weights for one row, which takes base int8 and one of the targets {able}. "
            "Leave it out, or type --precision int8:decode=w4 --target cpu"
        )
    foreign = quant_config.asked - {"float", *target.schemes}
    if foreign:
        raise TargetError(
            f"target '{target.name}' does not run {', '.join(sorted(foreign))} layers. "
            f"It runs: float, {', '.join(target.schemes)}"
        )
    if quant_config.cache == "int8" and not target.int8_cache:
        able = ", ".join(name for name, other in TARGETS.items() if other.int8_cache)
        raise TargetError(
            f"target '{target.name}' does not run cache=int8: its kernels for it are not ones this "
            f"project has seen run. Leave it out, or choose one of {able}"
        )


def kept_float(
    quant_config: QuantConfig, schemes: Mapping[str, Scheme], calibration: Calibration | None
) -> Sequence[str]:
    """Return layers that stay float after all: those named, and the most sensitive share."""
    for name in quant_config.keep_names:
        if name not in schemes:
            hint = nearest(name, tuple(schemes))
            raise TargetError(f"keep={name}: no quantised layer has this name.{hint}")
    if not quant_config.keep:
        return quant_config.keep_names
    assert calibration is not None
    errors = {}
    for ranges in calibration.groups.values():
        for name, by_scheme in ranges.sensitivity.items():
            if name in schemes:
                errors[name] = by_scheme[schemes[name]]
    count = math.ceil(quant_config.keep * len(errors))
    ranked = sorted(errors, key=lambda name: (-errors[name], name))
    return tuple(dict.fromkeys((*quant_config.keep_names, *ranked[:count])))


def _scheme(group: Group, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """Return the scheme that a group's quantised layers have in common."""
    return next((schemes[name] for name in group.linears if name in schemes), None)


def _alpha(
    group: Group, schemes: Mapping[str, Scheme], ranges: GroupRanges, half: bool
) -> float | None:
    """Return by how much the group's inputs are smoothed; None: not at all."""
    scheme = _scheme(group, schemes)
    if group.fold is None or scheme not in ("w8a8", "w4"):
        return None
    alpha, factors = ranges.smoothing(scheme)
    if half and float((ranges.absmax / factors).max(initial=0)) > SAFE_MAX:
        return None  # the smoothed input would leave FP16
    return alpha
