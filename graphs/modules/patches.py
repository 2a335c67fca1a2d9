"""Patches to visual rows: an encoder of pictures of any shape, whose patches are one sequence.

A patch says where it is by two rotary turns, of its row and its column, and by learned positions
that were resampled to the picture's grid: both come from the host (``ImageLayout.feeds``). A square
of patches becomes one row, and so do states of layers on the way, for what is added within the
decoder. Parameter names are the checkpoint's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..precision import NO_FALLBACK, Fp32Fallback
from ..vision_config import VisionConfig
from .decoder import Call
from .layer import Linear, Norm
from .ops import Eager
from .vision import Encoder, activate

_THETA = 10000.0


def patch_norm(vision: VisionConfig, ops: Eager, width: int) -> nn.Module:
    """Return a norm of the kind that the encoder has."""
    if vision.rms:
        return Norm(ops, width, vision.eps)
    return nn.LayerNorm(width, eps=vision.eps)


class Kernel(nn.Module):
    """The weights of a convolution that takes each patch apart: (D, C, frames, p, p)."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        side = vision.patch_size
        shape = (vision.hidden, vision.channels, vision.frames, side, side)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(vision.hidden)) if vision.learned else None


class PatchStem(nn.Module):
    """State 0, and the rotary turns that all layers share."""

    def __init__(
        self, vision: VisionConfig, ops: Eager, kernel: Kernel, positions: nn.Embedding | None
    ):
        super().__init__()
        self.ops, self.kernel, self.positions = ops, kernel, positions
        self.kind = (vision, ops.name)
        quarter = vision.hidden // vision.heads // 4
        self.frequencies = [_THETA ** -(at / quarter) for at in range(quarter)]

    def forward(
        self,
        pixels: Tensor,
        turns: Tensor,
        taps: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (1, P, D), and cosines and sines (1, P, d/2).

        pixels: (P, C*p*p) float32 of a still picture, which all frames of a kernel see alike;
        turns: (P, 2) rows and columns; taps, weights: (P, 4) learned positions and their shares.
        """
        weight = self.kernel.weight
        flat = self.ops.reshape(weight.sum(2), (weight.shape[0], pixels.shape[1]))
        states = self.ops.linear(pixels.to(weight.dtype), flat, self.kernel.bias)
        if self.positions is not None:
            assert taps is not None
            assert weights is not None
            learned = self.positions(taps) * weights[:, :, None].to(weight.dtype)
            states = states + learned.sum(1)
        inverse = torch.tensor(self.frequencies, device=turns.device)
        angles = (turns[:, :, None].float() * inverse).flatten(1)[None]
        return states[None], angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)


class IntoWindows(nn.Module):
    """Rows of patches into the slots of windows."""

    kind = ()

    def forward(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Return (W, L, D) for rows (1, P, D); slots: (W, L) patches, or -1: any will do."""
        return F.embedding(slots.clamp_min(0), rows[0])


class OutOfWindows(nn.Module):
    """Rows of patches in the picture's order."""

    kind = ()

    def forward(self, rows: Tensor, places: Tensor) -> Tensor:
        """Return (1, P, D) for rows (W, L, D); places: (P,) the slot of each patch."""
        return F.embedding(places, rows.flatten(0, 1))[None]


class WindowMask(nn.Module):
    """Visibility within windows: slots without a patch are seen by none."""

    kind = ()

    def forward(self, slots: Tensor) -> Tensor:
        """Return (W, 1, L, L) bool for slots (W, L)."""
        return (slots >= 0)[:, None, None].expand(-1, -1, slots.shape[1], -1)


class PatchAttention(nn.Module):
    """Attention of all patches of a window to all. x: (W*L, D)."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.heads, self.ops = vision.heads, ops
        self.qkv = Linear(ops, vision.hidden, 3 * vision.hidden, bias=True)
        self.proj = Linear(ops, vision.hidden, vision.hidden, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
        """Return (W*L, D) for x: (W*L, D); cos, sin: (W, L, d/2); seen: (W, 1, L, L) bool."""
        shape = (*cos.shape[:2], 3, self.heads, x.shape[1] // self.heads)
        split = self.ops.reshape(self.qkv(x), shape).permute(2, 0, 3, 1, 4)
        q, k = (self.ops.rotate(split[at], cos, sin) for at in range(2))
        out = self.ops.attend(q, k, split[2], seen)
        return self.proj(self.ops.reshape(out.transpose(1, 2), x.shape))


class PatchMLP(nn.Module):
    """Two projections around the encoder's activation; a third one gates where it is ``gated``."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.activation, self.gated = vision.activation, vision.gated
        width, wide = vision.hidden, vision.intermediate
        if vision.gated:
            self.gate_proj = Linear(ops, width, wide, bias=True)
            self.up_proj = Linear(ops, width, wide, bias=True)
            self.down_proj = Linear(ops, wide, width, bias=True)
        else:
            self.linear_fc1 = Linear(ops, width, wide, bias=True)
            self.linear_fc2 = Linear(ops, wide, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (P, D) for x: (P, D)."""
        if self.gated:
            return self.down_proj(activate(self.activation, self.gate_proj(x)) * self.up_proj(x))
        return self.linear_fc2(activate(self.activation, self.linear_fc1(x)))


class PatchLayer(nn.Module):
    """Pre-norm transformer layer over patches."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.ops, self.kind = ops, (vision, ops.name)
        self.norm1 = patch_norm(vision, ops, vision.hidden)
        self.norm2 = patch_norm(vision, ops, vision.hidden)
        self.attn = PatchAttention(vision, ops)
        self.mlp = PatchMLP(vision, ops)

    def forward(
        self, states: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Return (W, L, D) for (W, L, D), of one window or several; cos, sin: (W, L, d/2); seen:
        (W, 1, L, L) bool, None: all see all.
        """
        x = self.ops.reshape(states, (states.shape[0] * states.shape[1], states.shape[2]))
        x = x + self.attn(self.norm1(x), cos, sin, seen)
        return self.ops.reshape(x + self.mlp(self.norm2(x)), states.shape)


class Merger(nn.Module):
    """A square of patches through two projections to a row of the decoder's width.

    ``joined``: normalised as one, not patch by patch; ``wide``: as of ``vision.Projector``.
    """

    def __init__(self, config: ModelConfig, ops: Eager, *, joined: bool, wide: bool):
        super().__init__()
        vision = config.vision
        width = self.width = vision.hidden * vision.merge**2
        self.ops, self.joined, self.wide = ops, joined, wide
        self.activation = config.projector_activation
        self.kind = (vision, config.projector_activation, joined, wide, ops.name)
        self.norm = patch_norm(vision, ops, width if joined else vision.hidden)
        self.linear_fc1 = Linear(ops, width, width, bias=True)
        self.linear_fc2 = Linear(ops, width, config.text.hidden, bias=True)

    def forward(self, states: Tensor) -> Tensor:
        """Return (1, N, D') for states (1, P, D)."""
        x = states[0] if self.joined else self.norm(states[0])
        x = self.ops.reshape(x, (x.shape[0] * x.shape[1] // self.width, self.width))
        x = self.norm(x) if self.joined else x
        rows = self.linear_fc2(activate(self.activation, self.linear_fc1(x)))[None]
        return rows.float() if self.wide else rows


class PatchEncoder(nn.Module):
    """An encoder's pieces under the checkpoint's names; ``PatchVision`` runs them."""

    def __init__(self, config: ModelConfig, ops: Eager, wide: bool):
        super().__init__()
        vision = config.vision
        self.patch_embed = nn.ModuleDict({"proj": Kernel(vision)})
        self.pos_embed = None
        if vision.learned:  # uninitialised, as in ``vision.Embeddings``
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
        self.into, self.out, self.mask = IntoWindows(), OutOfWindows(), WindowMask()

    def compose(self, call: Call, *feeds: Any) -> tuple[Any, ...]:
        """Run the encoder as calls of its pieces; feeds: as the graph has them."""
        visual, vision = self.visual, self.config
        stem = PatchStem(vision, self.ops, visual.patch_embed["proj"], visual.pos_embed)
        count = 4 if vision.learned else 2
        states, *turns = call(stem, *feeds[:count])
        whole, within = turns, []
        if vision.window:
            slots, places = feeds[count:]
            within = [*(call(self.into, own, slots) for own in turns), call(self.mask, slots)]
        cut = False
        added = {}
        for index, layer in enumerate(visual.blocks):
            windowed = bool(vision.window) and index not in vision.whole
            if windowed != cut:
                states = (
                    call(self.into, states, slots) if windowed else call(self.out, states, places)
                )
                cut = windowed
            states = call(layer, states, *(within if windowed else whole))
            if index + 1 in self.fusion.injected:
                at = self.fusion.injected.index(index + 1)
                added[at] = call(visual.deepstack_merger_list[at], states)
        if cut:
            states = call(self.out, states, places)
        rows = call(visual.merger, states)
        return (*self.of_rows(call, rows), *(added[at] for at in sorted(added)))
