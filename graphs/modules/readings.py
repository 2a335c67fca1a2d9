"""Readings of selectors at the encoder's output: features, keys, attention, likeness of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..vision_contract import NEAREST_WORDS
from .ops import Eager


class Readings(nn.Module):
    """Outputs of the encoder that a selector reads, in the order of ``names``.

    Of blocks of patches attention and keys are the means. Where rows are put in lines so are these;
    what is read of a line's end, which shows nothing, is what is read of the token before it.
    """

    def __init__(self, config: ModelConfig, ops: Eager, names: tuple[str, ...]):
        super().__init__()
        self.names, self.skip, self.ops = names, first_row(config), ops
        self.states = len(config.fusion.means) + len(config.feature_layers)
        self.block, self.merges = config.block, config.varies
        self.edge = config.vision.image_size // config.vision.patch_size
        self.kind = (names, self.skip, self.states, self.block, self.merges, ops.name)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the readings, for the chosen states (B, T, D), those of the last layer, and what
        ``vision.Pack`` takes beside rows.
        """
        count = self.states + sum(name in ("saliency", "keys") for name in self.names)
        states, attention = given[: self.states], list(given[self.states : count])
        packing = given[count:]

        def of_image(values: Tensor) -> Tensor:
            values = self._of_image(values)
            return in_lines(values, *packing) if packing else values

        out = []
        for name in self.names:
            if name == "class_row":
                out.append(side_by_side([state[:, 0] for state in states]))
            elif name in ("features", "similarity"):
                features = side_by_side([state[:, self.skip :] for state in states])
                features = of_image(in_blocks(self.ops, features, self.edge, self.block))
                out.append(features if name == "features" else cosines(features))
            else:
                out.append(of_image(self._means(attention.pop(0)[:, self.skip :])))
        return tuple(out)

    def _means(self, values: Tensor) -> Tensor:
        """Return the means (B, T / s^2, ...) over blocks of values (B, T, ...)."""
        if self.block == 1:
            return values
        wide = values if values.ndim == 3 else values[..., None]
        cut = in_blocks(self.ops, wide, self.edge, self.block)
        shape = (*cut.shape[:2], self.block**2, wide.shape[-1])
        means = self.ops.reshape(cut, shape).mean(2)
        return means if values.ndim == 3 else means[..., 0]

    def _of_image(self, values: Tensor) -> Tensor:
        """Return values (T, N, ...) of tiles as those of their image, (1, T N, ...)."""
        if not self.merges:
            return values
        tiles, tokens, *tail = values.shape
        return self.ops.reshape(values, (1, tiles * tokens, *tail))


def in_lines(values: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return values (1, N, ...) of the rows in an image's lines, of those of tiles (1, M, ...).

    ``index`` (N,), or (N, 4) with ``weights``, names M at the end of a line.
    """
    wide = values if values.ndim == 3 else values[..., None]
    taps = index if index.ndim == 2 else index[:, None]
    ends = taps[:, :1] == wide.shape[1]
    taps = torch.where(ends, torch.cat((taps[:1], taps[:-1])), taps)
    if weights is not None:
        weights = torch.where(ends, torch.cat((weights[:1], weights[:-1])), weights)
    # A line without tokens has an end all the same: of a picture thinner than a token.
    known = torch.cat((wide, wide[:, -1:]), 1)
    out = gathered(known, taps if weights is not None else taps[:, 0], weights)
    return out if values.ndim == 3 else out[..., 0]


def gathered(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return rows (1, N, D) of (1, M, D) by index (N,), or sums of four by (N, 4) and weights."""
    if weights is None:
        return rows.index_select(1, index)
    first, *others = (
        rows.index_select(1, index[:, tap]).float() * weights[:, tap, None] for tap in range(4)
    )
    for tap in others:  # one after the other: four times all rows are much at once
        first = first + tap
    return first.to(rows.dtype)


class RowSimilarity(nn.Module):
    """Cosines of all pairs of projected rows."""

    kind = ()

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, N, N) float32 for (B, N, D)."""
        return cosines(rows)


class NearestWords(nn.Module):
    """Ids of the input embeddings that projected rows resemble most, by cosine.

    The product is of the weights' type; lengths are in FP32.
    """

    kind = ()

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, N, 3) int64, the nearest first, for rows (B, N, D)."""
        unit = _unit(rows).to(self.weight.dtype)
        lengths = torch.linalg.vector_norm(self.weight, dim=-1, dtype=torch.float32)
        similar = (unit @ self.weight.T).float() / lengths.clamp_min(1e-12)
        return similar.topk(NEAREST_WORDS).indices


def cosines(rows: Tensor) -> Tensor:
    """Return the cosines (B, N, N) of all pairs of rows (B, N, h) in FP32; of zeros they are 0."""
    unit = _unit(rows)
    return unit @ unit.transpose(1, 2)


def _unit(rows: Tensor) -> Tensor:
    """Return rows (B, N, h) in FP32, of length 1 or of zeros."""
    wide = rows.float()
    lengths = wide.pow(2).sum(-1, keepdim=True).sqrt()
    return wide / lengths.clamp_min(1e-12)


def in_blocks(ops: Eager, x: Tensor, edge: int, side: int) -> Tensor:
    """Return (B, T / s^2, s^2 D) for (B, T, D), T = edge^2: blocks of s x s patches row by row, as
    are those in each.
    """
    if side == 1:
        return x
    batch, tokens, width = x.shape
    cut = ops.reshape(x, (batch, edge // side, side, edge // side, side * width)).transpose(2, 3)
    return ops.reshape(cut, (batch, tokens // side**2, side**2 * width))


def first_row(config: ModelConfig) -> int:
    """Return the index of a state's first row that becomes a visual token."""
    return 1 if config.select == "default" else 0  # CLIP: behind its class token


def side_by_side(features: list[Tensor]) -> Tensor:
    """Return features (B, N, D) each as one (B, N, D') of all."""
    return torch.cat(features, dim=-1) if len(features) > 1 else features[0]
