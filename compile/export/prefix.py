"""Keys and values of the rows before every image, computed once when a bundle is built.

The prefix (BOS, system prompt, ``USER: ``) is the same for every question and sees no vision, so of
a plan its routers alone change it. It runs in FP32, one layer's weights in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...graphs.bundle import Prefix, TensorRef
from ...graphs.config import TextConfig
from ...graphs.modules.decoder import Body, Head
from ...graphs.modules.ops import Eager
from ...graphs.plan.plan import StagePlan
from ...graphs.progress import Advance, no_advance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.names import EMBEDDING
from ..layer_stream import Streamed, without_weights

PREFIX_FILE = "prefix.bin"


def prefix_cache(
    checkpoint: Checkpoint,
    plan: StagePlan,
    ids: Sequence[int],
    progress: Advance = no_advance,
) -> Tensor:
    """Return rotated keys and values of ``ids`` in every layer, (2, L, G, P, d) FP32."""
    text = checkpoint.config.text
    rows = checkpoint.load(EMBEDDING)[list(ids)].float()[None]
    positions = torch.arange(len(ids))[None]
    first = torch.zeros(1, dtype=torch.int64)
    shared = Head(text, Eager(), plan.routing)(rows, positions, positions, positions, first, None)
    cos, sin, visible, *rivals = shared
    out = torch.zeros(2, text.layers, text.kv_heads, len(ids), text.head_dim)
    plain = ("dense", "gated", (0, 0))
    kinds = {layer: (*plain, plan.routing_of(layer)) for layer in range(text.layers)}
    body = without_weights(lambda: Body(text, Eager(), kinds))
    call = Streamed(checkpoint, nn.ModuleDict({"model": body}), progress)
    for layer, keys, values in zip(body.layers.values(), *out, strict=True):
        cache = (keys[None], values[None])  # filled in place
        known = rivals if layer.routers else ()
        rows, *_ = call(layer, rows, cos, sin, first, visible, None, None, None, *cache, *known)
    return out


def describe_prefix(text: TextConfig, ids: Sequence[int], dtype: str) -> Prefix:
    """Say where ``write_prefix`` puts things: the keys, then the values, nothing between."""
    shape = (text.layers, text.kv_heads, len(ids), text.head_dim)
    half = math.prod(shape) * getattr(torch, dtype).itemsize
    keys, values = (TensorRef(PREFIX_FILE, offset, dtype, shape) for offset in (0, half))
    return Prefix(tuple(ids), keys, values)


def write_prefix(cache: Tensor, dtype: str, folder: Path) -> list[str]:
    """Write the cache (2, L, G, P, d) in the type ``dtype``; return the file's name."""
    stored = cache.to(getattr(torch, dtype)).contiguous()
    (folder / PREFIX_FILE).write_bytes(stored.view(torch.uint8).numpy().data)
    return [PREFIX_FILE]
