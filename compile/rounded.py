"""A checkpoint as a quantised bundle computes it: the floats that its integers stand for.

A walk reads weights from here instead of the checkpoint, and rounds what linear layers are given;
so it sees what rounding makes of a model without a bundle. Integers, scales and folded factors are
those of ``quantize.Rounding``; sums are in FP32, where a bundle's are of integers. Two things are
not here: ONNX Runtime by itself also rounds, as it runs, the inputs of layers whose weights alone
are rounded (its ``session.qdq_matmulnbits_accuracy_level``); and INT8 caches round what they keep.
Bundles that are measured do both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calib.calibration import Calibration
from ..calib.rounding import restored, unpack_int4
from ..graphs.ops import Eager
from ..graphs.quantization import Recipe, block_of
from ..graphs.quantized import INPUT_SCALE, SCALE, WEIGHT
from ..graphs.targets import TARGETS
from .checkpoint import Checkpoint
from .quantize import Rounding, resolve


class Rounded:
    """The model of ``recipe`` under the ranges and the plan of ``calibration``, on target ``cpu``.

    Raises:
        TargetError: the recipe cannot be honoured, see ``quantize.resolve``.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration):
        target = TARGETS["cpu"]
        quantization = resolve(recipe, calibration, checkpoint.config, calibration.plan, target)
        self.checkpoint, self.schemes = checkpoint, quantization.schemes
        self.engines = target.engines
        self._rounding = Rounding(
            checkpoint, quantization, calibration, half=False, engines=self.engines
        )
        self._scales: dict[str, Tensor] = {}

    def load(self, name: str) -> Tensor:
        """The tensor that the checkpoint calls ``name``, as it comes out of rounding."""
        module, _, own = name.rpartition(".")
        if own == "weight" and module in self.schemes:
            return self._weight(module)
        if self._rounding.changes(name):
            return self._rounding.tensor(name)
        return self.checkpoint.load(name)

    def inputs(self, linear: str, rows: Tensor) -> Tensor:
        """What a linear layer computes with when it is given ``rows`` (Q, K)."""
        if self.schemes.get(linear) != "w8a8":
            return rows
        if linear not in self._scales:
            self._scales[linear] = self._rounding.tensor(f"{linear}.{INPUT_SCALE}")
        return Eager().rounded(rows, self._scales[linear])

    def _weight(self, module: str) -> Tensor:
        scheme = self.schemes[module]
        outputs, inputs = self.checkpoint.tensors[f"{module}.weight"].shape
        values = self._rounding.tensor(f"{module}.{WEIGHT[scheme]}").numpy()
        if scheme == "w4":
            values = unpack_int4(values, (inputs, outputs))
        scales = self._rounding.tensor(f"{module}.{SCALE}").numpy()
        if scheme == "w8a8":  # while they are at hand: rounding a weight again takes long
            self._scales[module] = self._rounding.tensor(f"{module}.{INPUT_SCALE}")
        return torch.from_numpy(restored(values, scales, block_of(scheme, engines=self.engines)))
