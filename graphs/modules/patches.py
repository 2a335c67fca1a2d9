"""Patches to visual rows: an encoder of pictures of any shape, whose patches are one sequence.

A patch says where it is by two rotary turns, of its row and its column, and by learned positions
that were resampled to the picture's grid: both come from the host (``ImageLayout.feeds``). A square
of patches becomes one row, and so do states of layers on the way, for what is added within the
decoder. Parameter names are the checkpoint's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..precision import NO_FALLBACK, Fp32Fallback
from ..vision_config import VisionConfig
from .decoder import Call
from .layer import Linear
from .ops import Eager
from .vision import Encoder, activate

_THETA = 10000.0


class Kernel(nn.Module):
    """The weights of a convolution that takes each patch apart: (D, C, frames, p, p)."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        side = vision.patch_size
        shape = (vision.hidden, vision.channels, vision.frames, side, side)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(vision.hidden))


class PatchStem(nn.Module):
    """State 0, and the rotary turns that all layers share."""

    def __init__(self, vision: VisionConfig, ops: Eager, kernel: Kernel, positions: nn.Embedding):
        super().__init__()
        self.ops, self.kernel, self.positions = ops, kernel, positions
        self.kind = (vision, ops.name)
        quarter = vision.hidden // vision.heads // 4
        self.frequencies = [_THETA ** -(at / quarter) for at in range(quarter)]

    def forward(
        self, pixels: Tensor, turns: Tensor, taps: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (1, P, D), and cosines and sines (1, P, d/2).

        pixels: (P, C*p*p) float32 of a still picture, which all frames of a kernel see alike;
        turns: (P, 2) rows and columns; taps, weights: (P, 4) learned positions and their shares.
        """
        weight = self.kernel.weight
        flat = self.ops.reshape(weight.sum(2), (weight.shape[0], pixels.shape[1]))
        states = self.ops.linear(pixels.to(weight.dtype), flat, self.kernel.bias)
        learned = self.positions(taps) * weights[:, :, None].to(weight.dtype)
        inverse = torch.tensor(self.frequencies, device=turns.device)
        angles = (turns[:, :, None].float() * inverse).flatten(1)[None]
        states = (states + learned.sum(1))[None]
        return states, angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)


class PatchAttention(nn.Module):
    """Attention of all patches to all. x: (P, D)."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.heads, self.ops = vision.heads, ops
        self.qkv = Linear(ops, vision.hidden, 3 * vision.hidden, bias=True)
        self.proj = Linear(ops, vision.hidden, vision.hidden, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (P, D) for x: (P, D); cos, sin: (1, P, d/2)."""
        shape = (x.shape[0], 3, self.heads, x.shape[1] // self.heads)
        split = self.ops.reshape(self.qkv(x), shape).permute(1, 2, 0, 3)
        q, k = (self.ops.rotate(split[at][None], cos, sin) for at in range(2))
        out = self.ops.attend(q, k, split[2][None], None)[0]
        return self.proj(self.ops.reshape(out.transpose(0, 1), x.shape))


class PatchMLP(nn.Module):
    """Two projections around the encoder's activation."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.activation = vision.activation
        self.linear_fc1 = Linear(ops, vision.hidden, vision.intermediate, bias=True)
        self.linear_fc2 = Linear(ops, vision.intermediate, vision.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (P, D) for x: (P, D)."""
        return self.linear_fc2(activate(self.activation, self.linear_fc1(x)))


class PatchLayer(nn.Module):
    """Pre-norm transformer layer over patches."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.kind = (vision, ops.name)
        self.norm1 = nn.LayerNorm(vision.hidden, eps=vision.eps)
        self.norm2 = nn.LayerNorm(vision.hidden, eps=vision.eps)
        self.attn = PatchAttention(vision, ops)
        self.mlp = PatchMLP(vision, ops)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (1, P, D) for (1, P, D)."""
        x = states[0]
        x = x + self.attn(self.norm1(x), cos, sin)
        return (x + self.mlp(self.norm2(x)))[None]


class Merger(nn.Module):
    """A square of patches through two projections to a row of the decoder's width.

    ``joined``: normalised as one, not patch by patch; ``wide``: as of ``vision.Projector``.
    """

    def __init__(self, config: ModelConfig, ops: Eager, *, joined: bool, wide: bool):
        super().__init__()
        vision = config.vision
        width = vision.hidden * vision.merge**2
        self.ops, self.joined, self.wide = ops, joined, wide
        self.activation = config.projector_activation
        self.kind = (vision, config.projector_activation, joined, wide, ops.name)
        self.norm = nn.LayerNorm(width if joined else vision.hidden, eps=vision.eps)
        self.linear_fc1 = Linear(ops, width, width, bias=True)
        self.linear_fc2 = Linear(ops, width, config.text.hidden, bias=True)

    def forward(self, states: Tensor) -> Tensor:
        """Return (1, N, D') for states (1, P, D)."""
        x = states[0] if self.joined else self.norm(states[0])
        width = self.linear_fc1.weight.shape[-1]
        x = self.ops.reshape(x, (x.shape[0] * x.shape[1] // width, width))
        x = self.norm(x) if self.joined else x
        rows = self.linear_fc2(activate(self.activation, self.linear_fc1(x)))[None]
        return rows.float() if self.wide else rows


class PatchEncoder(nn.Module):
    """An encoder's pieces under the checkpoint's names; ``PatchVision`` runs them."""

    def __init__(self, config: ModelConfig, ops: Eager, wide: bool):
        super().__init__()
        vision = config.vision
        self.patch_embed = nn.ModuleDict({"proj": Kernel(vision)})
        # Uninitialised, as in ``vision.Embeddings``.
        positions = torch.empty(vision.patches, vision.hidden)
        self.pos_embed = nn.Embedding(*positions.shape, _weight=positions)
        self.blocks = nn.ModuleList(PatchLayer(vision, ops) for _ in range(vision.layers))
        self.merger = Merger(config, ops, joined=False, wide=wide)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, ops, joined=True, wide=wide) for _ in config.fusion.injected
        )


class PatchVision(Encoder):
    """An encoder of patches, and its mergers."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Eager,
        fallback: Fp32Fallback = NO_FALLBACK,
        readings: tuple[str, ...] = ("rows",),
    ):
        super().__init__(config, readings)
        self.config, self.ops = config.vision, ops
        self.visual = PatchEncoder(config, ops, fallback.rows)

    def compose(self, call: Call, *feeds: Any) -> tuple[Any, ...]:
        """Run the encoder as calls of its pieces; feeds: as ``PatchStem.forward``."""
        visual = self.visual
        stem = PatchStem(self.config, self.ops, visual.patch_embed["proj"], visual.pos_embed)
        states, cos, sin = call(stem, *feeds)
        added = {}
        for index, layer in enumerate(visual.blocks, 1):
            states = call(layer, states, cos, sin)
            if index in self.fusion.injected:
                at = self.fusion.injected.index(index)
                added[at] = call(visual.deepstack_merger_list[at], states)
        rows = call(visual.merger, states)
        return (*self.of_rows(call, rows), *(added[at] for at in sorted(added)))
