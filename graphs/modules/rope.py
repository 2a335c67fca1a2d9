"""Rotary frequencies of a decoder, as its config states them.

The formulas (default, linear, llama3, yarn, ...) are transformers' own; this module only asks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from ..text_config import TextConfig


def frequencies(text: TextConfig) -> tuple[Tensor, float]:
    """Return inverse frequencies (d/2,) FP32 and the factor that scales cosines and sines."""
    if text.rope.type == "default":
        even = torch.arange(0, text.head_dim, 2, dtype=torch.float32, device="cpu")
        exponents = even / text.head_dim
        return 1.0 / (text.rope.theta**exponents), 1.0
    config = LlamaConfig(
        hidden_size=text.hidden,
        num_attention_heads=text.heads,
        head_dim=text.head_dim,
        max_position_embeddings=text.max_positions,
        rope_parameters={"rope_theta": text.rope.theta, **dict(text.rope.parameters)},
    )
    with torch.device("cpu"):  # whatever device the caller makes modules on
        inverse, scaling = ROPE_INIT_FUNCTIONS[text.rope.type](config, torch.device("cpu"))
    return inverse.float(), float(scaling)


def turn(
    inverse: Tensor,
    scaling: float,
    positions: Tensor,
    dtype: torch.dtype,
    axis: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, Q, d/2), computed in FP32, then rounded.

    positions: (B, Q), or (B, Q, A), of which each frequency turns by that of ``axis`` (d/2,).
    """
    if positions.ndim == 2:
        positions = positions[:, :, None]
    else:
        places = torch.tensor(axis, device=positions.device)
        positions = torch.index_select(positions, 2, places)
    angles = positions.float() * inverse
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


class Rotary(nn.Module):
    """Rotary turns of the rows of a call."""

    def __init__(self, text: TextConfig):
        super().__init__()
        self.kind: tuple = (text,)
        inverse, self.scaling = frequencies(text)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)
        self.axis = text.rope.axis

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, Q, d/2), in the type of the rows (B, Q, D).

        positions: (B, Q) where they are the same on all axes, or (B, Q, A).
        """
        given = (self.inverse_frequencies, self.scaling, positions, rows.dtype, self.axis)
        return turn(*given)
