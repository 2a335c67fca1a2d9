"""Pixels of square tiles to hidden state 0: patches, the class token, learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..vision_config import VisionConfig
from .ops import Eager


class PatchEmbedding(nn.Module):
    """The kernel of a convolution whose patches do not overlap: a product with each of them.

    As a product it needs no library of convolutions on a GPU. Weights have the checkpoint's shape.
    """

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.ops, self.side = ops, vision.patch_size
        # Uninitialised, as ``Linear`` is: random numbers on a meta device load half of torch.
        self.weight = nn.Parameter(
            torch.empty(vision.hidden, vision.channels, self.side, self.side)
        )
        biased = vision.kind != "clip"
        self.bias = nn.Parameter(torch.empty(vision.hidden)) if biased else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, P, D), line by line, for pixels (B, C, H, W); what is over is left out."""
        batch, channels, *sides = pixels.shape
        rows, columns = (size // self.side for size in sides)
        whole = pixels[:, :, : rows * self.side, : columns * self.side]
        shape = (batch, channels, rows, self.side, columns, self.side)
        cut = self.ops.reshape(whole, shape).permute(0, 2, 4, 1, 3, 5)
        size, width = channels * self.side**2, self.weight.shape[0]
        patches = self.ops.reshape(cut, (batch * rows * columns, size))
        kernel = self.ops.reshape(self.weight, (width, size))
        states = self.ops.linear(patches, kernel, self.bias)
        return self.ops.reshape(states, (batch, rows * columns, width))


class Embeddings(nn.Module):
    """Patches, the class token where the encoder has one, and learned positions."""

    def __init__(self, vision: VisionConfig, ops: Eager):
        super().__init__()
        self.patch_embedding = PatchEmbedding(vision, ops)
        batched = (1,) if vision.kind == "internvit" else ()
        first = torch.empty(*batched, *batched, vision.hidden)
        self.class_embedding = nn.Parameter(first) if vision.has_class_token else None
        self.position_embedding = Positions((*batched, vision.tokens, vision.hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, T, D) for pixels: (B, C, H, W)."""
        weight = self.position_embedding.weight
        patches = self.patch_embedding(pixels.to(weight.dtype))
        if self.class_embedding is not None:
            first = self.class_embedding.expand(pixels.shape[0], 1, -1)
            patches = torch.cat((first, patches), dim=1)
        return patches + weight


class Positions(nn.Module):
    """Learned positions of patches, a table under the checkpoint's name."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Stem(nn.Module):
    """Hidden state 0: the embeddings, normalised in CLIP."""

    def __init__(self, embeddings: Embeddings, norm: nn.LayerNorm | None):
        super().__init__()
        self.embeddings, self.norm = embeddings, norm
        self.kind = (norm and norm.eps, embeddings.patch_embedding.ops.name)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, T, D) for pixels: (B, C, H, W) float32."""
        states = self.embeddings(pixels)
        return states if self.norm is None else self.norm(states)
