"""Pixels to visual rows: the CLIP or SigLIP encoder, the chosen hidden states, the projector.

Only the layers up to the deepest chosen hidden state are built. Parameter names are the
checkpoint's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, VisionConfig
from ..precision import NO_FALLBACK, Fp32Fallback
from .decoder import Call, Linear, direct
from .ops import Eager


def activate(name: str, x: Tensor) -> Tensor:
    """Apply one of the activations that published vision encoders and projectors use."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "gelu":
        return F.gelu(x)
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return F.gelu(x, approximate="tanh")
    return x.relu() if name == "relu" else x * torch.sigmoid(x)  # silu


class EncoderAttention(nn.Module):
    """Bidirectional attention without a mask. x: (B*T, D)."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.heads, self.ops = vision.heads, ops
        width = vision.hidden
        self.q_proj = Linear(ops, width, width, bias=True)
        self.k_proj = Linear(ops, width, width, bias=True)
        self.v_proj = Linear(ops, width, width, bias=True)
        self.out_proj = Linear(ops, width, width, bias=True)

    def forward(self, x: Tensor, batch: int, tokens: int) -> Tensor:
        """Return (B*T, D) for x: (B*T, D)."""

        def heads(projected: Tensor) -> Tensor:
            shape = (batch, tokens, self.heads, projected.shape[-1] // self.heads)
            return self.ops.reshape(projected, shape).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        out = self.ops.attend(q, k, v, None)
        return self.out_proj(self.ops.reshape(out.transpose(1, 2), x.shape))


class EncoderMLP(nn.Module):
    """Two projections around the encoder's activation."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.activation = vision.activation
        self.fc1 = Linear(ops, vision.hidden, vision.intermediate, bias=True)
        self.fc2 = Linear(ops, vision.intermediate, vision.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B*T, D) for x: (B*T, D)."""
        return self.fc2(activate(self.activation, self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer of a vision encoder."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.ops = ops
        self.kind = (vision, ops.name)
        self.self_attn = EncoderAttention(vision, ops)
        self.layer_norm1 = nn.LayerNorm(vision.hidden, eps=vision.eps)
        self.mlp = EncoderMLP(vision, ops)
        self.layer_norm2 = nn.LayerNorm(vision.hidden, eps=vision.eps)

    def forward(self, states: Tensor) -> Tensor:
        """Return (B, T, D) for (B, T, D)."""
        batch, tokens, width = states.shape
        x = self.ops.reshape(states, (batch * tokens, width))
        x = x + self.self_attn(self.layer_norm1(x), batch, tokens)
        x = x + self.mlp(self.layer_norm2(x))
        return self.ops.reshape(x, (batch, tokens, width))


class Embeddings(nn.Module):
    """Patches, the class token where the encoder has one (CLIP), and learned positions."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        clip = vision.kind == "clip"
        self.patch_embedding = nn.Conv2d(
            vision.channels, vision.hidden, vision.patch_size, vision.patch_size, bias=not clip
        )
        self.class_embedding = nn.Parameter(torch.empty(vision.hidden)) if clip else None
        # Uninitialised, as ``Linear`` is: random numbers on a meta device load half of torch.
        positions = torch.empty(vision.tokens, vision.hidden)
        self.position_embedding = nn.Embedding(*positions.shape, _weight=positions)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, T, D) for pixels: (B, C, H, W)."""
        weight = self.position_embedding.weight
        patches = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            first = self.class_embedding.expand(pixels.shape[0], 1, -1)
            patches = torch.cat((first, patches), dim=1)
        return patches + weight


class Stem(nn.Module):
    """Hidden state 0: the embeddings, normalised in CLIP."""

    def __init__(self, embeddings: Embeddings, norm: nn.LayerNorm | None):
        super().__init__()
        self.embeddings, self.norm = embeddings, norm
        self.kind = (norm and norm.eps,)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, T, D) for pixels: (B, C, H, W) float32."""
        states = self.embeddings(pixels)
        return states if self.norm is None else self.norm(states)


class _EncoderLayers(nn.Module):
    def __init__(self, vision: VisionConfig, ops: Eager, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(vision, ops) for _ in range(depth))


class VisionEncoder(nn.Module):
    """An encoder's pieces under the checkpoint's names; ``Vision`` runs them."""

    def __init__(self, vision: VisionConfig, ops: Eager, depth: int):
        super().__init__()
        self.embeddings = Embeddings(vision)
        if vision.kind == "clip":
            self.pre_layrnorm = nn.LayerNorm(vision.hidden, eps=vision.eps)  # sic, in checkpoints
        self.encoder = _EncoderLayers(vision, ops, depth)


class Projector(nn.Module):
    """The chosen hidden states, side by side, through two projections to the decoder's width.

    ``wide``: the decoder takes its rows in FP32 whatever the weights are.
    """

    def __init__(self, config: ModelConfig, ops: Eager, wide: bool = False):
        super().__init__()
        self.wide, self.ops = wide, ops
        self.kind = (config.projector_activation, config.select, wide, ops.name)
        self.activation = config.projector_activation
        self.skip = 1 if config.select == "default" else 0  # CLIP: its class token
        width = config.vision.hidden * len(config.feature_layers)
        self.linear_1 = Linear(ops, width, config.text.hidden, config.projector_bias)
        self.linear_2 = Linear(ops, config.text.hidden, config.text.hidden, config.projector_bias)

    def forward(self, *states: Tensor) -> Tensor:
        """Return visual rows (B, N, D') for states (B, T, D) each."""
        chosen = [state[:, self.skip :] for state in states]
        features = torch.cat(chosen, dim=-1) if len(chosen) > 1 else chosen[0]
        batch, tokens, width = features.shape
        x = self.linear_1(self.ops.reshape(features, (batch * tokens, width)))
        x = self.linear_2(activate(self.activation, x))
        rows = self.ops.reshape(x, (batch, tokens, x.shape[-1]))
        return rows.float() if self.wide else rows


class Vision(nn.Module):
    """The ``vision`` graph: ``contract.vision_spec``."""

    def __init__(self, config: ModelConfig, ops: Eager, fallback: Fp32Fallback = NO_FALLBACK):
        super().__init__()
        self.chosen = config.feature_states
        self.vision_tower = VisionEncoder(config.vision, ops, config.encoder_depth)
        self.multi_modal_projector = Projector(config, ops, fallback.rows)

    def compose(self, call: Call, pixels: Any) -> Any:
        """Run the encoder as calls of its pieces, as ``decoder.DecoderStage.compose``."""
        vision_encoder = self.vision_tower
        stem = Stem(vision_encoder.embeddings, getattr(vision_encoder, "pre_layrnorm", None))
        hidden = [call(stem, pixels)]
        for index, layer in enumerate(vision_encoder.encoder.layers):
            hidden.append(call(layer, hidden[-1]))
            if index not in self.chosen:
                hidden[index] = None  # layer streaming holds those of many images at once
        return call(self.multi_modal_projector, *(hidden[index] for index in self.chosen))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return visual rows (B, N, D) for pixels: (B, C, H, W) float32."""
        return self.compose(direct, pixels)
