"""Keys and values of the rows before every image, computed once when a bundle is built.

The prefix (BOS, system prompt, ``USER: ``) is the same for every question and sees no vision, so no
plan changes it. It runs in FP32, one layer's weights in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..graphs.bundle import Prefix, TensorRef
from ..graphs.config import TextConfig
from ..graphs.decoder import DecoderLayer
from ..graphs.ops import Eager
from ..graphs.rope import rotary
from .checkpoint import Checkpoint
from .names import EMBEDDING
from .stitch import TORCH_DTYPES

FILE = "prefix.bin"


@torch.no_grad()
def prefix_cache(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    progress: Callable[[int], None] = lambda layers: None,
) -> Tensor:
    """(2, L, G, P, d) FP32: rotated keys and values of ``ids`` in every layer."""
    text = checkpoint.config.text
    rows = checkpoint.load(EMBEDDING)[list(ids)].float()[None]
    positions = torch.arange(len(ids))[None]
    view = Eager().view(positions, positions, torch.zeros(1, dtype=torch.int64))
    cos, sin = rotary(text, positions, torch.float32)
    out = torch.empty(2, text.layers, text.kv_heads, len(ids), text.head_dim)
    layer = DecoderLayer(text, Eager())  # one, filled anew for each: no second copy in memory
    for index in range(text.layers):
        for name, weight in layer.state_dict().items():
            weight.copy_(checkpoint.load(f"model.layers.{index}.{name}"))
        checkpoint.release()
        empty = torch.zeros(1, text.kv_heads, len(ids), text.head_dim)
        rows, _, keys, values = layer(rows, cos, sin, *view, None, None, empty, empty.clone())
        out[0, index], out[1, index] = keys[0], values[0]
        progress(1)
    return out


def describe_prefix(text: TextConfig, ids: Sequence[int], dtype: str) -> Prefix:
    """Where ``write_prefix`` puts things: the keys, then the values, nothing between."""
    shape = (text.layers, text.kv_heads, len(ids), text.head_dim)
    half = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    keys, values = (TensorRef(FILE, offset, dtype, shape) for offset in (0, half))
    return Prefix(tuple(ids), keys, values)


def write_prefix(cache: Tensor, dtype: str, folder: Path) -> list[str]:
    """Write the cache in the graphs' type; returns the file's name."""
    stored = cache.to(TORCH_DTYPES[dtype]).contiguous()
    (folder / FILE).write_bytes(stored.view(torch.uint8).numpy().data)
    return [FILE]
