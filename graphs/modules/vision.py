"""Pixels to visual rows: the encoder, the chosen hidden states, the projector.

Only the layers up to the deepest chosen hidden state are built. Parameter names are the
checkpoint's own. For a plan with an entry, the encoder hands out what its selector reads, and the
projector is a graph of its own where it comes after the choice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..precision import NO_FALLBACK, Fp32Fallback
from ..selectors.entry import PROJECTED
from ..vision_config import VisionConfig
from .decoder import Call, direct
from .layer import Linear, Norm
from .ops import Eager
from .readings import (
    NearestWords,
    Readings,
    RowSimilarity,
    first_row,
    gathered,
    in_blocks,
    side_by_side,
)
from .stem import Embeddings, Stem

_QK_EPS = 1e-6  # of transformers' class, whatever the config says


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
        width, biased = vision.hidden, vision.biased
        self.q_proj = Linear(ops, width, width, bias=biased)
        self.k_proj = Linear(ops, width, width, bias=biased)
        self.v_proj = Linear(ops, width, width, bias=biased)
        self.out_proj = Linear(ops, width, width, bias=True)
        self.normed = vision.qk_norm
        if self.normed:
            self.q_norm, self.k_norm = (Norm(ops, width, _QK_EPS) for _ in range(2))

    def forward(self, x: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B*T, D) for x: (B*T, D), and queries and keys (B, H, T, d)."""

        def heads(projected: Tensor) -> Tensor:
            shape = (batch, tokens, self.heads, projected.shape[-1] // self.heads)
            return self.ops.reshape(projected, shape).transpose(1, 2)

        query, key = self.q_proj(x), self.k_proj(x)
        if self.normed:  # of the whole width, before it is cut into heads
            query, key = self.q_norm(query), self.k_norm(key)
        q, k, v = heads(query), heads(key), heads(self.v_proj(x))
        out = self.ops.attend(q, k, v, None)
        return self.out_proj(self.ops.reshape(out.transpose(1, 2), x.shape)), q, k


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
    """Pre-norm transformer layer of a vision encoder.

    ``reads``: which of ``saliency`` (B, T) and ``keys`` (B, T, d), both FP32, it returns besides.
    """

    def __init__(self, vision: VisionConfig, ops: Eager, reads: tuple[str, ...] = ()):
        super().__init__()
        self.ops, self.reads = ops, reads
        self.has_class_token, self.scaled = vision.has_class_token, vision.kind == "internvit"
        self.kind = (vision, ops.name, *reads)
        self.self_attn = EncoderAttention(vision, ops)
        self.layer_norm1 = _norm(vision, ops)
        self.mlp = EncoderMLP(vision, ops)
        self.layer_norm2 = _norm(vision, ops)
        if self.scaled:
            self.lambda_1, self.lambda_2 = (
                nn.Parameter(torch.empty(vision.hidden)) for _ in range(2)
            )

    def forward(self, states: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return (B, T, D) for (B, T, D), and what is read of the attention behind it."""
        batch, tokens, width = states.shape
        x = self.ops.reshape(states, (batch * tokens, width))
        mixed, query, key = self.self_attn(self.layer_norm1(x), batch, tokens)
        x = x + (self.lambda_1 * mixed if self.scaled else mixed)
        update = self.mlp(self.layer_norm2(x))
        x = x + (self.lambda_2 * update if self.scaled else update)
        out = self.ops.reshape(x, (batch, tokens, width))
        readings = []
        if "saliency" in self.reads:
            readings.append(_saliency(query, key, self.has_class_token))
        if "keys" in self.reads:
            readings.append(key.float().mean(1))
        return (out, *readings) if readings else out


def _norm(vision: VisionConfig, ops: Eager) -> nn.Module:
    """Return a norm of an encoder's layers."""
    if vision.rms:
        return Norm(ops, vision.hidden, vision.eps)
    return nn.LayerNorm(vision.hidden, eps=vision.eps)


def _saliency(query: Tensor, key: Tensor, has_class_token: bool) -> Tensor:
    """Return the attention (B, T) that each token receives, mean over heads, for (B, H, T, d).

    From the class token; where there is none, from all tokens, as peers do for SigLIP.
    """
    asking = query[:, :, :1] if has_class_token else query
    scores = asking.float() * query.shape[-1] ** -0.5 @ key.float().transpose(-1, -2)
    return scores.softmax(-1).mean((1, 2))


class _EncoderLayers(nn.Module):
    def __init__(self, vision: VisionConfig, ops: Eager, depth: int, reads: tuple[str, ...]):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(vision, ops, reads if layer == depth - 1 else ()) for layer in range(depth)
        )


class LastNorm(nn.LayerNorm):
    """Norm of the last hidden state."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps)
        self.kind = (eps,)


class VisionEncoder(nn.Module):
    """An encoder's pieces under the checkpoint's names; ``Vision`` runs them.

    ``reads``: what is read of the last layer's attention (``EncoderLayer``).
    """

    def __init__(self, vision: VisionConfig, ops: Eager, depth: int, reads: tuple[str, ...] = ()):
        super().__init__()
        self.embeddings = Embeddings(vision, ops)
        if vision.kind == "clip":
            self.pre_layrnorm = nn.LayerNorm(vision.hidden, eps=vision.eps)  # sic, in checkpoints
        self.encoder = _EncoderLayers(vision, ops, depth, reads)
        if vision.final_norm:
            self.post_layernorm = LastNorm(vision.hidden, vision.eps)


class Projector(nn.Module):
    """The chosen hidden states, side by side, through two projections to the decoder's width.

    ``wide``: the decoder takes its rows in FP32 whatever the weights are. ``whole``: takes states
    with their first row, which the model may leave out. ``width``: of all states together.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Eager,
        wide: bool = False,
        whole: bool = True,
        width: int | None = None,
    ):
        super().__init__()
        self.wide, self.ops = wide, ops
        self.skip = first_row(config) if whole else 0
        self.block = config.block if whole else 1
        self.merges, self.edge = config.varies, config.vision.image_size // config.vision.patch_size
        self.kind = (
            config.projector_activation,
            self.skip,
            wide,
            ops.name,
            self.block,
            self.merges,
        )
        self.activation = config.projector_activation
        width = config.feature_width if width is None else width
        if config.projector_norm:
            self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = Linear(ops, width, config.text.hidden, config.projector_bias)
        if config.projector_layers > 1:
            size = config.text.hidden
            self.linear_2 = Linear(ops, size, size, config.projector_bias)

    def forward(self, *states: Tensor) -> Tensor:
        """Return visual rows (B, N, D') for states (B, T, D) each.

        Where images differ in their tiles, these are the batch, and the rows those of one image.
        """
        features = side_by_side([state[:, self.skip :] for state in states])
        features = in_blocks(self.ops, features, self.edge, self.block)
        batch, tokens, width = features.shape
        flat = self.ops.reshape(features, (batch * tokens, width))
        x = self.linear_1(self.layer_norm(flat) if hasattr(self, "layer_norm") else flat)
        if hasattr(self, "linear_2"):
            x = self.linear_2(activate(self.activation, x))
        shape = (1, batch * tokens) if self.merges else (batch, tokens)
        rows = self.ops.reshape(x, (*shape, x.shape[-1]))
        return rows.float() if self.wide else rows


class Mean(nn.Module):
    """The mean of several hidden states."""

    kind = ()

    def forward(self, *states: Tensor) -> Tensor:
        """Return (B, T, D) for states (B, T, D) each."""
        return torch.stack(states).sum(0) / len(states)


class Pack(nn.Module):
    """Rows of all tiles in the order of the picture's lines, each of which ends in one more row."""

    kind = ()

    def __init__(self, width: int):
        super().__init__()
        self.newline = nn.Parameter(torch.empty(width))

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return rows (1, N, D) of (1, M, D), of which ``index`` (N,) may name one behind them; or
        sums of four, by (N, 4) and their ``weights``, where lines were shrunk.
        """
        end = self.newline.to(rows.dtype)[None, None]
        return gathered(torch.cat((rows, end), 1), index, weights)


class Encoder(nn.Module):
    """The ``vision`` graph (``vision_contract.vision_spec``), for some of ``vision_readings``."""

    def __init__(self, config: ModelConfig, readings: tuple[str, ...]):
        super().__init__()
        self.projects, self.fusion = "rows" in readings, config.fusion
        self.row_similarity = RowSimilarity() if "row_similarity" in readings else None
        if "vocabulary" in readings:  # under the name that the table has in checkpoints
            words = NearestWords(config.text.vocab, config.text.hidden)
            self.model = nn.ModuleDict({"embed_tokens": words})

    def compose(self, call: Call, *feeds: Any) -> tuple[Any, ...]:
        """Run the encoder as calls of its pieces, as ``decoder.DecoderStage.compose``."""
        raise NotImplementedError

    def of_rows(self, call: Call, rows: Any) -> tuple[Any, ...]:
        """Return what is read of the visual rows, and the rows."""
        out: tuple[Any, ...] = ()
        if self.row_similarity is not None:
            out += (call(self.row_similarity, rows),)
        if hasattr(self, "model"):
            out += (call(self.model["embed_tokens"], rows),)
        return (*out, rows)

    def forward(self, *feeds: Tensor) -> Any:
        """Return visual rows (B, N, D) for pixels float32 and other inputs, or a tuple of all that
        is handed out.
        """
        out = self.compose(direct, *feeds)
        return out[0] if len(out) == 1 else out


class Vision(Encoder):
    """An encoder of square tiles, and its projector."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Eager,
        fallback: Fp32Fallback = NO_FALLBACK,
        readings: tuple[str, ...] = ("rows",),
    ):
        super().__init__(config, readings)
        self.chosen, self.mean = config.feature_states, Mean()
        names = tuple(
            name
            for name in readings
            if name not in PROJECTED and (config.has_class_row or name != "class_row")
        )
        attention = tuple(name for name in ("saliency", "keys") if name in names)
        self.vision_tower = VisionEncoder(config.vision, ops, config.encoder_depth, attention)
        if self.projects:
            self.multi_modal_projector = Projector(config, ops, fallback.rows)
        if config.packs:
            self.pack = Pack(config.text.hidden)
        # Of each injected state, under the released name.
        self.mm_projectors = nn.ModuleList(
            Projector(config, ops, fallback.rows, width=config.vision.hidden)
            for _ in config.fusion.injected
        )
        self.readings = Readings(config, ops, names) if names else None

    def compose(self, call: Call, *feeds: Any) -> tuple[Any, ...]:
        """Run the encoder as calls of its pieces; feeds: pixels (B, C, H, W), and perhaps what
        ``Pack`` takes.
        """
        pixels, *packing = feeds
        vision_encoder = self.vision_tower
        stem = Stem(vision_encoder.embeddings, getattr(vision_encoder, "pre_layrnorm", None))
        hidden = [call(stem, pixels)]
        attention: tuple[Any, ...] = ()
        read = {*self.chosen, *self.fusion.states}
        for index, layer in enumerate(vision_encoder.encoder.layers):
            state = call(layer, hidden[-1])
            if layer.reads:
                state, *rest = state
                attention = tuple(rest)
            hidden.append(state)
            if index not in read:
                hidden[index] = None  # layer streaming holds those of many images at once
        if hasattr(vision_encoder, "post_layernorm"):
            hidden[-1] = call(vision_encoder.post_layernorm, hidden[-1])
        states = [
            *(call(self.mean, *hidden[first : last + 1]) for first, last in self.fusion.means),
            *(hidden[index] for index in self.chosen),
        ]
        out: tuple[Any, ...] = ()
        if self.readings is not None:
            out = tuple(call(self.readings, *states, *attention, *packing))
        if self.projects:
            rows = call(self.multi_modal_projector, *states)
            if hasattr(self, "pack"):
                rows = call(self.pack, rows, *packing)
            out += self.of_rows(call, rows)
        for projector, state in zip(self.mm_projectors, self.fusion.injected, strict=True):
            out += (call(projector, hidden[state]),)
        return out


class Projection(nn.Module):
    """The ``project`` graph: ``vision_contract.project_spec``."""

    def __init__(self, config: ModelConfig, ops: Eager, fallback: Fp32Fallback = NO_FALLBACK):
        super().__init__()
        self.multi_modal_projector = Projector(config, ops, fallback.rows, whole=False)

    def compose(self, call: Call, features: Any) -> tuple[Any, ...]:
        """Run the projector as a call of a piece."""
        return (call(self.multi_modal_projector, features),)

    def forward(self, features: Tensor) -> Tensor:
        """Return visual rows (B, K, D) for features (B, K, h)."""
        return self.compose(direct, features)[0]
