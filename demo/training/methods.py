"""Forward passes of the methods that the demo is fine-tuned for: what their plans compute.

    before (B, P, D) + image (B, N, D)   ---+--- question 1: [its visual rows] + text
      shared by all questions               +--- question 2: ...                   (B, Q, K + T, D)

Each question is as if it were alone behind its image, at the positions that it would have alone.
Rules: docs/methods.md, "HiDrop", "ViCA", "SkipGPT", "Layer fusion" and "Group positions".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .packed import rope_tables, rotate

ROUTERS = ("router_attention", "router_mlp")
"""Modules of a layer, by the names that SkipGPT released them with."""


@dataclass(frozen=True)
class ForwardRule:
    """The differences of a method's forward pass from the dense one.

    Attributes:
        plan: what compiles to it, of a decoder of eight layers.
        sees: layers with visual rows; elsewhere these wait as they are. None: all.
        keep: visual rows that each question keeps, by the layer that scores them and runs first
            without the others.
        frozen: whether visual rows serve keys and values, and get no update.
        prefix_frozen: whether attention adds nothing to the rows before the image.
        routed: whether routers let rows skip attention and MLP.
        states: hidden states of the vision encoder side by side at the projector; empty: the
            configured one.
        config: fields that ``config.json`` gets.
        apart: whether the assistant's prompt and the answer have positions 0, 1, ... of their own.
    """

    plan: str = "dense"
    sees: frozenset[int] | None = None
    keep: Mapping[int, int] = field(default_factory=dict)
    frozen: bool = False
    prefix_frozen: bool = False
    routed: bool = False
    states: tuple[int, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False


RULES = {
    "hidrop": ForwardRule(
        "hidrop:entry=4,exit=7,edges=5-6,keep=24-4",
        sees=frozenset((4, 5, 6)),
        keep={5: 24, 6: 4},
    ),
    "vica": ForwardRule("vica:layers=0-2-4,prefix=updated", sees=frozenset((0, 2, 4)), frozen=True),
    "skipgpt": ForwardRule("skipgpt", routed=True),
    "fusion": ForwardRule(
        states=(1, 3, 4),
        config={"layer_fusing_strategy": "E_D", "layer_using_strategy": "3-18-23"},
    ),
    "group": ForwardRule(apart=True),
}


class GateRouter(torch.nn.Module):
    """A router of SkipGPT: one gate a row."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden_layer = torch.nn.Linear(width, width // 4)
        self.weight_predictor = torch.nn.Linear(width // 4, 2)

    def forward(self, rows: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """Return gates (..., 1) of raw rows (..., D) in FP32.

        ``temperature``: of Gumbel noise, drawn in training; gradients are the soft gates'.
        """
        with torch.autocast("cpu", enabled=False):
            numbers = self.weight_predictor(torch.relu(self.hidden_layer(rows.float())))
        if temperature is None:
            return (numbers[..., :1] >= numbers[..., 1:]).float()
        return F.gumbel_softmax(numbers, temperature, hard=True)[..., :1]


@torch.no_grad()
def prepare(model, rule: ForwardRule, seed: int = 0) -> None:
    """Give ``model`` the weights that it lacks for ``rule``, untrained: drawn, the same each time.

    Columns of the projector for further states have the spread of a new model's; those of the
    configured state are the model's. Routers are as torch makes them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if rule.routed:
            for layer in model.model.language_model.layers:
                for name in ROUTERS:
                    setattr(layer, name, GateRouter(model.config.text_config.hidden_size))
        if rule.states:
            linear = model.model.multi_modal_projector.linear_1
            width = linear.in_features * len(rule.states)
            drawn = torch.randn(linear.out_features, width) * width**-0.5
            drawn[:, -linear.in_features :] = linear.weight
            linear.weight, linear.in_features = torch.nn.Parameter(drawn), width


def visual_features(model, pixels: torch.Tensor, rule: ForwardRule) -> torch.Tensor:
    """Return projected features (B, N, D) of ``pixels``; the vision encoder is not trained."""
    with torch.no_grad():
        encoder = model.model.vision_tower
        states = [encoder.pre_layrnorm(encoder.embeddings(pixels))]
        for layer in encoder.encoder.layers[:-1]:
            states.append(layer(states[-1], attention_mask=None))
        chosen = [states[at][:, 1:] for at in rule.states] or [states[-1][:, 1:]]
    return model.model.multi_modal_projector(torch.cat(chosen, -1))


@dataclass(frozen=True)
class RowBlock:
    """Rows (B, Q, n, D) with their positions (B, Q, n); Q is 1 where all questions share them."""

    x: torch.Tensor
    at: torch.Tensor

    def joined(self, other: RowBlock | None) -> RowBlock:
        """Return both, ``other`` behind."""
        if other is None:
            return self
        return RowBlock(torch.cat((self.x, other.x), 2), torch.cat((self.at, other.at), 2))

    def moved(self, x: torch.Tensor) -> RowBlock:
        """Return the same places with other rows."""
        return RowBlock(x, self.at)


@dataclass(frozen=True)
class Heads:
    """Queries, scaled, keys and values (B, H, Q, n, d) of a block in one layer."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, layer, rows: RowBlock, tables, heads: int) -> Heads:
        """Return those of ``rows`` by the layer's norm and projections."""
        attention, x = layer.self_attn, layer.input_layernorm(rows.x)

        def split(projection):
            return projection(x).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)

        q, k, v = (split(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        cos, sin = (table[rows.at][:, None].to(q.dtype) for table in tables)
        return cls(rotate(q, cos, sin) * q.shape[-1] ** -0.5, rotate(k, cos, sin), v)

    def to_shared(self, shared: Heads) -> torch.Tensor:
        """Return scores (B, H, Q, n, S) on the keys of a block that all questions share."""
        far = self.q.flatten(2, 3) @ shared.k[:, :, 0].transpose(-1, -2)
        return far.unflatten(2, self.q.shape[2:4])


def attend(own: Heads, shared: Heads | None = None) -> torch.Tensor:
    """Return mixed values (B, Q, n, H d) of rows that see ``shared``, and those before them.

    Written out: on a CPU the fused kernel's backward pass in BF16 is five times slower.
    """
    near = own.q @ own.k.transpose(-1, -2)
    near = near.masked_fill(torch.ones(near.shape[-2:]).triu(1).bool(), -1e9)
    if shared is None:
        mixed = near.softmax(-1) @ own.v
    else:
        far = own.to_shared(shared)
        far, near = (
            torch.cat((far, near), -1).softmax(-1).split((far.shape[-1], near.shape[-1]), -1)
        )
        mixed = (far.flatten(2, 3) @ shared.v[:, :, 0]).unflatten(2, far.shape[2:4]) + near @ own.v
    return mixed.permute(0, 2, 3, 1, 4).flatten(-2)


@torch.no_grad()
def strongest(
    image: RowBlock, shared: Heads, own: Heads, front: int, last: torch.Tensor, keep: int
) -> torch.Tensor:
    """Return the ``keep`` visual rows (B, Q, K), ascending, that each prompt's last row attends to.

    Args:
        image: visual rows, shared or each question's own.
        shared: heads of the layer behind the edge; visual rows stand behind ``front`` rows.
        own: of each question's rows; where visual rows are its own, they stand first.
        front: P.
        last: (B, Q) index of the prompt's last row in the text.
        keep: K.
    """
    count, alone = image.x.shape[2], image.x.shape[1] > 1
    at = last + count * alone
    row = at[:, None, :, None, None].expand(-1, own.q.shape[1], -1, 1, own.q.shape[-1])
    asking = Heads(own.q.gather(3, row), own.k, own.v)
    near = (asking.q @ own.k.transpose(-1, -2))[..., 0, :]
    later = torch.arange(near.shape[-1]) > at[:, None, :, None]
    scores = torch.cat((asking.to_shared(shared)[..., 0, :], near.masked_fill(later, -1e9)), -1)
    start = shared.k.shape[3] if alone else front
    mass = scores.float().softmax(-1).mean(1)[..., start : start + count]
    return mass.topk(keep, -1).indices.sort(-1).values


def taken(image: RowBlock, index: torch.Tensor) -> RowBlock:
    """Return rows ``index`` (B, Q, K) of visual rows for each question."""
    asked = index.shape[1]
    x = image.x.expand(-1, asked, -1, -1)
    return RowBlock(
        x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])),
        image.at.expand(-1, asked, -1).gather(2, index),
    )


def forward(
    model,
    rule: ForwardRule,
    features: torch.Tensor,
    prefix_ids: torch.Tensor,
    ids: torch.Tensor,
    last: torch.Tensor,
    temperature: float | None = None,
    notes: list | None = None,
) -> torch.Tensor:
    """Return final hidden states (B, Q, T, D) of all text rows behind the image.

    Args:
        model: LlavaForConditionalGeneration, ``prepare``d for ``rule``.
        rule: the method.
        features: (B, N, D) projected features.
        prefix_ids: (P,) token ids before the image.
        ids: (B, Q, T) token ids behind it, padded at the end.
        last: (B, Q) index within T of the prompt's last row, the second of the assistant's prompt.
        temperature: of the routers' noise; None: no noise.
        notes: where given, a list that takes the gates of each router, one (B, Q, n, 1) a block.
    """
    lm = model.model.language_model
    heads, width = lm.config.num_attention_heads, features.shape[-1]
    batch, visual, front = len(features), features.shape[1], len(prefix_ids)
    tables = rope_tables(
        front + visual + ids.shape[2], width // heads, lm.config.rope_parameters["rope_theta"]
    )
    places = torch.arange(front + visual + ids.shape[2])[None, None]
    before = RowBlock(
        lm.embed_tokens(prefix_ids).expand(batch, 1, -1, -1),
        places[..., :front].expand(batch, 1, -1),
    )
    image = RowBlock(features[:, None], places[..., front : front + visual].expand(batch, 1, -1))
    at = places[..., front + visual :].expand(*ids.shape)
    if rule.apart:
        own = torch.arange(ids.shape[2]) - (last[..., None] - 1)
        at = torch.where(own >= 0, own, at)
    text = RowBlock(lm.embed_tokens(ids), at)

    def run(layer, rows: RowBlock, seen: Heads, shared: Heads | None, frozen: int = 0):
        """Return ``rows`` behind a layer; attention adds nothing to the first ``frozen``."""
        gates = [1.0, 1.0]
        if rule.routed:
            gates = [getattr(layer, name)(rows.x, temperature) for name in ROUTERS]
            if notes is not None:
                notes.append(gates)
        update = layer.self_attn.o_proj(attend(seen, shared))
        if frozen:
            update = F.pad(update[:, :, frozen:], (0, 0, frozen, 0))
        y = rows.x + gates[0] * update
        return rows.moved(y + gates[1] * layer.mlp(layer.post_attention_layernorm(y)))

    for index, layer in enumerate(lm.layers):
        sees = rule.sees is None or index in rule.sees
        for narrow in (index in rule.keep, False):
            alone = image.x.shape[1] > 1
            shared = before.joined(image if sees and not alone else None)
            own = image.joined(text) if sees and alone else text
            of_shared, of_own = (Heads.of(layer, rows, tables, heads) for rows in (shared, own))
            if not narrow:
                break
            kept = strongest(image, of_shared, of_own, front, last, rule.keep[index])
            image = taken(image, kept)
        own = run(layer, own, of_own, of_shared)
        shared = run(layer, shared, of_shared, None, front if rule.prefix_frozen else 0)
        count = image.x.shape[2]
        before = before.moved(shared.x[:, :, :front])
        text = text.moved(own.x[:, :, -ids.shape[2] :])
        if sees and not rule.frozen:
            image = image.moved(own.x[:, :, :count] if alone else shared.x[:, :, front:])
    return lm.norm(text.x)
