"""Integers in a module: linear layers over rounded weights, and attention over a rounded cache.

Weights are [K, N] and every product is a ``MatMul``: engines fuse the rounding into that form only
(``Gemm`` runs unfused, many times slower). Layers of one input share its range; ``replace_linears``
says why each may still hold a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..linears import Group
from ..quantization import CacheScheme, Scheme, block_of
from .layer import KeyValues, Linear
from .ops import Eager

WEIGHT = {"w8a8": "weight_int8", "w8": "weight_int8", "w4": "weight_int4"}
"""Parameter that holds the rounded weight, by scheme. INT4 values stand one to a byte in torch, two
to a byte in files."""

SCALE = {"w8a8": "weight_scale", "w8": "weight_scale", "w4": "weight_scale_4bit"}
"""Parameter that holds the weight's scales, by scheme: a layer may have a weight of both widths."""

INPUT_SCALE, ZERO = "input_scale", "weight_zero"
"""The other parameters. The zero points of INT8 in blocks are all 0, and there for ONNX Runtime:
where it makes weights unsigned (``runtime.backends.ort.EXACT``) it would otherwise give them
one of a wrong shape, and fail.
"""

CACHE_SCALES = ("key_scale", "value_scale")
"""Parameters of an attention whose cache is INT8, (G,) each."""


def cache_scale_names(layer: int) -> tuple[str, str]:
    """Return the scales' names of keys and values of a decoder layer, as graphs have them."""
    key, value = (f"model.layers.{layer}.self_attn.{own}" for own in CACHE_SCALES)
    return key, value


def is_cache_scale(name: str) -> bool:
    """Return whether a graph's tensor of this name is the scale of a cache."""
    return name.endswith(tuple(f".self_attn.{own}" for own in CACHE_SCALES))


def scale_shape(block: int | None, inputs: int, outputs: int) -> tuple[int, ...]:
    """Return the shape of a weight's scales: (N,), or with blocks (ceil(K / block), N)."""
    return (outputs,) if block is None else (-(-inputs // block), outputs)


class QuantizedLinear(nn.Module):
    """A projection from integer weights. x: (M, K) -> (M, N).

    Parameters: ``WEIGHT`` (K, N) int8, ``SCALE`` as ``scale_shape``, for ``w8a8`` ``input_scale``
    (), for ``w8`` in blocks ``weight_zero``, and perhaps ``bias`` (N,).
    """

    def __init__(
        self, ops: Eager, scheme: Scheme, inputs: int, outputs: int, bias: bool, block: int | None
    ):
        super().__init__()
        self.ops, self.scheme, self.block = ops, scheme, block
        values = torch.empty(inputs, outputs, dtype=torch.int8)
        setattr(self, WEIGHT[scheme], nn.Parameter(values, requires_grad=False))
        scales = torch.empty(scale_shape(block, inputs, outputs))
        setattr(self, SCALE[scheme], nn.Parameter(scales))
        self.input_scale = nn.Parameter(torch.empty(())) if scheme == "w8a8" else None
        zero = torch.zeros(scales.shape, dtype=torch.int8)
        in_blocks = scheme == "w8" and block is not None
        self.weight_zero = nn.Parameter(zero, requires_grad=False) if in_blocks else None
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return as ``layer.Linear`` does; ``input_scale`` is that of x as it comes, scaled."""
        if self.input_scale is not None:
            x = self.ops.fake_quantised(x, self.input_scale)
        values = getattr(self, WEIGHT[self.scheme])
        scales = getattr(self, SCALE[self.scheme])
        weight = self.ops.restored(values, scales, self.block, self.weight_zero)
        out = self.ops.product(x, weight)
        if self.bias is None:
            return out
        return out + (self.bias if scale == 1.0 else self.bias * scale)


def replace_linears(
    module: nn.Module, schemes: Mapping[str, Scheme], groups: Iterable[Group], *, engines: bool
) -> None:
    """Put a ``QuantizedLinear`` where ``schemes`` names a layer of ``module``, in place.

    ``engines``: as TensorRT likes it, the layers of one input round it once. ONNX Runtime does not
    fuse a rounded tensor that several products read; there each layer rounds for itself, with
    scales that differ in their last bit so that the roundings are not merged again.
    """
    first: dict[str, nn.Parameter] = {}
    group_of = {name: group.name for group in groups for name in group.linears}
    for name, linear in list(module.named_modules()):
        scheme = schemes.get(name)
        if scheme is None or not isinstance(linear, Linear):
            continue
        outputs, inputs = linear.weight.shape
        block = block_of(scheme, inputs, engines=engines)
        bias = linear.bias is not None
        new = QuantizedLinear(linear.ops, scheme, inputs, outputs, bias, block)
        if engines and new.input_scale is not None:
            new.input_scale = first.setdefault(group_of[name], new.input_scale)
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, new)


def round_caches(module: nn.Module, cache: CacheScheme) -> None:
    """Give every attention of ``module`` a cache of the type ``cache``, in place."""
    if cache == "float":
        return
    for attention in module.modules():
        if isinstance(attention, KeyValues):
            for own in CACHE_SCALES:
                if hasattr(attention, own):  # a layer ahead has no values
                    setattr(attention, own, nn.Parameter(torch.empty(attention.text.kv_heads)))
