"""Keys and values of the rows before every image, computed once when a bundle is built.

The prefix (BOS, system prompt, ``USER: ``) is the same for every question and sees no vision: of a
plan only its routers, frozen rows and dropped layers change it. It runs in FP32, one layer's
weights in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...graphs.bundle import Prefix, TensorRef
from ...graphs.modules.decoder import Body, Head
from ...graphs.modules.ops import Eager
from ...graphs.plan.gains import stage_gains
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import FROZEN_ROWS
from ...graphs.progress import Advance, no_advance
from ...graphs.text_config import TextConfig
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
    """Return rotated keys and values of ``ids`` in every layer of ``plan``, (2, L, G, P, d) FP32,
    where an image follows; zeros of layers that do not attend.
    """
    text = checkpoint.config.text
    rows = checkpoint.load(EMBEDDING)[list(ids)].float()[None]
    positions = torch.arange(len(ids))[None]
    first = torch.zeros(1, dtype=torch.int64)
    shared = Head(text, Eager(), plan.routing)(rows, positions, positions, positions, first, None)
    cos, sin, visible, *rivals = shared
    out = torch.zeros(2, text.layers, text.kv_heads, len(ids), text.head_dim)
    kinds: dict[int, tuple] = {
        layer: ("dense", "gated", (0, 0), plan.routing_of(layer), stage.parts_of(layer))
        for stage in plan.stages
        for layer in range(*stage.layers)
        if stage.parts_of(layer)
    }
    body = without_weights(lambda: Body(text, Eager(), kinds))
    call = Streamed(checkpoint, nn.ModuleDict({"model": body}), progress)
    gains = _prefix_gains(plan, len(ids))
    for number, layer in body.layers.items():
        keys, values = out[:, int(number)]
        cache = (keys[None], values[None])  # filled in place
        known = rivals if layer.routers else ()
        own = gains.get(int(number), (None, None))
        given = (rows, cos, sin, first, visible, None, None, None, *cache, *own, *known)
        rows, *_ = call(layer, *given)
    return out


def _prefix_gains(plan: StagePlan, count: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, by layer, the gains (1, P) of attention and MLP where a plan freezes rows."""
    kinds = {name: np.full((1, count), name == "prefix") for name in FROZEN_ROWS}
    return {
        layer: (torch.from_numpy(attention), torch.from_numpy(mlp))
        for stage in plan.stages
        if stage.masked
        for layer, (attention, mlp) in zip(
            stage.gained_layers, stage_gains(stage, kinds), strict=True
        )
    }


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
