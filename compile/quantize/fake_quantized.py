"""Fake quantisation of a checkpoint: the floats that a quantised bundle's integers stand for.

A layer-wise run reads weights from here instead of the checkpoint, rounds inputs of linear layers,
and caches integers where the recipe says so: it sees the effect of rounding without a bundle.
Integers, scales and folded factors are those of ``compile/quantize/quantize.py``; sums are in
FP32, where a bundle's are of integers. One thing is left out: ONNX Runtime also rounds, as it runs,
the inputs of layers whose weights alone are rounded (its
``session.qdq_matmulnbits_accuracy_level``). Bundles that are measured do.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...graphs.modules.ops import Eager, Scales
from ...graphs.modules.quantized import INPUT_SCALE, SCALE, WEIGHT, cache_scale_names
from ...graphs.quantization import QuantConfig, block_of
from ...graphs.targets import TARGETS
from ..checkpoint.checkpoint import Checkpoint
from .calibration_file import Calibration
from .int_arithmetic import restored, unpack_int4
from .quantize import QuantisedTensors, calibrated_cache_scales, quantised_rows, resolve


class FakeQuantised:
    """Model of ``quant_config`` under ranges and plan of ``calibration``, on target ``cpu``.

    Attributes:
        cache: type of cached keys and values.

    Raises:
        TargetError, DataError: the recipe cannot be honoured, see ``quantize.resolve``.
    """

    def __init__(self, checkpoint: Checkpoint, quant_config: QuantConfig, calibration: Calibration):
        target = TARGETS["cpu"]
        quantization = resolve(
            quant_config, calibration, checkpoint.config, calibration.plan, target
        )
        self.checkpoint, self.schemes = checkpoint, quantization.schemes
        self.engines, self.cache = target.engines, quantization.cache
        self._quantised = QuantisedTensors(
            checkpoint, quantization, calibration, half=False, engines=self.engines
        )
        self._scales: dict[str, Tensor] = {}
        self._cache_scales: np.ndarray | None = None  # (2, L, G)
        self._named: dict[str, Tensor] = {}
        if quantization.quantises_cache:
            self._cache_scales = calibrated_cache_scales(calibration, half=False)
            for layer in range(self._cache_scales.shape[1]):
                pair = torch.from_numpy(self._cache_scales[:, layer])
                self._named |= zip(cache_scale_names(layer), pair, strict=True)

    def load(self, name: str) -> Tensor:
        """Return the tensor that the checkpoint calls ``name``, as rounding leaves it.

        Scales of INT8 caches, which no checkpoint has, have the names of the graphs.
        """
        if name in self._named:
            return self._named[name]
        module, _, own = name.rpartition(".")
        if own == "weight" and module in self.schemes:
            return self._weight(module)
        if self._quantised.changes(name):
            return self._quantised.tensor(name)
        return self.checkpoint.load(name)

    def inputs(self, linear: str, rows: Tensor) -> Tensor:
        """Return what a linear layer computes with for the input ``rows`` (Q, K)."""
        if self.schemes.get(linear) != "w8a8":
            return rows
        if linear not in self._scales:
            self._scales[linear] = self._quantised.tensor(f"{linear}.{INPUT_SCALE}")
        return Eager().fake_quantised(rows, self._scales[linear])

    def scales_of(self, layer: int) -> Scales | None:
        """Return scales of a layer's cache, (G,) each; None where it is float."""
        if self.cache == "float":
            return None
        key, value = cache_scale_names(layer)
        return self._named[key], self._named[value]

    def prefix(self, cache: Tensor) -> Tensor:
        """Return keys and values (2, L, G, P, d) FP32 of the prefix as a bundle ships them."""
        return cache if self._cache_scales is None else quantised_rows(cache, self._cache_scales)

    def _weight(self, module: str) -> Tensor:
        scheme = self.schemes[module]
        outputs, inputs = self.checkpoint.tensors[f"{module}.weight"].shape
        values = self._quantised.tensor(f"{module}.{WEIGHT[scheme]}").numpy()
        if scheme == "w4":
            values = unpack_int4(values, (inputs, outputs))
        scales = self._quantised.tensor(f"{module}.{SCALE[scheme]}").numpy()
        if scheme == "w8a8":  # while they are at hand: rounding a weight again takes long
            self._scales[module] = self._quantised.tensor(f"{module}.{INPUT_SCALE}")
        block = block_of(scheme, inputs, engines=self.engines)
        return torch.from_numpy(restored(values, scales, block))
