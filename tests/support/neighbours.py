"""Late entry and what builds on it, written to be obvious: the judges of these plans.

Whole sequences, no cache: every step of an answer runs all rows again, and what a prompt has chosen
is given to it. Rows are kept apart by their place in the unpruned prompt. It shares no code with
the stages (docs/methods.md, "Late entry").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from visistage.graphs.chain import torch_reference as chain

from .reference import norm, rope

LAYERS, HEADS, GROUPS, HIDDEN, VOCAB = 8, 4, 2, 32, 97
BEFORE, VISUAL, AFTER, NEW = 5, 12, 7, 8
TEXT = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}


def _weights() -> dict[str, Tensor]:
    """Weights so large that wrong ones show: scaled as in a trained model, not as at its start."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float = 1.5) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    kv = GROUPS * HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, HIDDEN**0.5)}
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (48, HIDDEN),
            "mlp.up_proj": (48, HIDDEN),
            "mlp.down_proj": (HIDDEN, 48),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            gain = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
            weights[f"model.layers.{layer}.{name}.weight"] = gain
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return weights


WEIGHTS = _weights()


@dataclass(frozen=True)
class Prompt:
    """A prompt of random rows: text, an image, text."""

    seed: int
    embeds: Tensor = field(init=False)
    before: int = BEFORE
    after: int = AFTER

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        table = WEIGHTS["model.embed_tokens.weight"]
        ids = torch.randint(0, VOCAB, (self.before + VISUAL + self.after,), generator=generator)
        rows = table[ids].clone()
        rows[self.image] = torch.randn(VISUAL, HIDDEN, generator=generator)
        object.__setattr__(self, "embeds", rows)

    @property
    def image(self) -> slice:
        return slice(self.before, self.before + VISUAL)

    @property
    def visual(self) -> Tensor:
        mask = torch.zeros(len(self.embeds), dtype=torch.bool)
        mask[self.image] = True
        return mask

    def run(self, plan, new=NEW):
        """Run the chain over it."""
        spans = [[(self.image.start, self.image.stop)]]
        return chain.run(WEIGHTS, TEXT, self.embeds[None], spans, plan, new)


@dataclass
class Rows:
    """Rows on their way: values (n, D), places in the unpruned prompt (n,), which are visual."""

    x: Tensor
    place: Tensor
    visual: Tensor

    def only(self, keep: Tensor) -> Rows:
        return Rows(self.x[keep], self.place[keep], self.visual[keep])

    def joined(self, other: Rows) -> Rows:
        """Both in the order of their places."""
        values = zip(vars(self).values(), vars(other).values(), strict=True)
        both = [torch.cat(pair) for pair in values]
        by_place = both[1].argsort()
        return Rows(*(values[by_place] for values in both))


def weight(layer: int, name: str) -> Tensor:
    return WEIGHTS[f"model.layers.{layer}.{name}.weight"]


def heads(x: Tensor, layer: int, name: str, positions: Tensor | None) -> Tensor:
    """Return (H, n, d) of normalised rows (n, D), rotated where positions are given."""
    made = (x @ weight(layer, f"self_attn.{name}").T).view(len(x), -1, HIDDEN // HEADS)
    made = made.transpose(0, 1)
    if positions is not None:
        made = rope(made, positions, TEXT["rope_theta"])
    return made if name == "q_proj" else made.repeat_interleave(HEADS // GROUPS, 0)


def attention(
    rows: Rows,
    keys: Rows,
    layer: int,
    positions: Callable[[Rows], Tensor],
    gate: Tensor | None = None,
) -> Tensor:
    """Return the update (n, D) of rows that attend to keys with places not above their own.

    ``gate``: factors (m,) of what each key gets, after the softmax.
    """
    x, of_keys = (norm(r.x, weight(layer, "input_layernorm"), 1e-5) for r in (rows, keys))
    q = heads(x, layer, "q_proj", positions(rows))
    k = heads(of_keys, layer, "k_proj", positions(keys))
    v = heads(of_keys, layer, "v_proj", None)
    hidden = keys.place[None] > rows.place[:, None]
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    shares = scores.softmax(-1) if gate is None else scores.softmax(-1) * gate
    out = (shares @ v).transpose(0, 1).reshape(len(rows.x), -1)
    return out @ weight(layer, "self_attn.o_proj").T


def mlp(x: Tensor, layer: int) -> Tensor:
    x = norm(x, weight(layer, "post_attention_layernorm"), 1e-5)
    gate = x @ weight(layer, "mlp.gate_proj").T
    return (gate * gate.sigmoid() * (x @ weight(layer, "mlp.up_proj").T)) @ weight(
        layer, "mlp.down_proj"
    ).T


def dense_layer(rows: Rows, layer: int, positions: Callable[[Rows], Tensor]) -> Rows:
    x = rows.x + attention(rows, rows, layer, positions)
    return Rows(x + mlp(x, layer), rows.place, rows.visual)


def places(rows: Rows) -> Tensor:
    return rows.place


def logits_of(rows: Rows) -> Tensor:
    last = norm(rows.x[-1], WEIGHTS["model.norm.weight"], 1e-5)
    return WEIGHTS["lm_head.weight"] @ last


Chosen = list[list[int]]
"""Places of the rows that each edge of a prompt has kept."""

Method = Callable[[Rows, int, Chosen | None], tuple[Tensor, Chosen]]
"""Takes all rows of prompt and answer, how many are the prompt's, and what its edges have kept,
None while that is open. Returns logits of the last row, and what they kept.
"""


@dataclass(frozen=True)
class Answer:
    """Logits (NEW, V) of each step, tokens, and what each edge kept."""

    logits: Tensor
    tokens: list[int]
    kept: Chosen


def generate(prompt: Prompt, method: Method, new: int = NEW) -> Answer:
    """Answer greedily, running the whole sequence every time."""
    x, visual, count = prompt.embeds, prompt.visual, len(prompt.embeds)
    logits, tokens, kept = [], [], None
    for _ in range(new):
        rows = Rows(x, torch.arange(len(x)), visual)
        found, kept = method(rows, count, kept)
        logits.append(found)
        tokens.append(int(found.argmax()))
        x = torch.cat((x, WEIGHTS["model.embed_tokens.weight"][tokens[-1]][None]))
        visual = torch.cat((visual, torch.tensor([False])))
    return Answer(torch.stack(logits), tokens, kept or [])


def late(sees: list[bool]) -> Method:
    """Visual rows are in the layers that see them; elsewhere they wait as they are."""

    def forward(rows: Rows, count: int, kept: Chosen | None) -> tuple[Tensor, Chosen]:
        text, vision = rows.only(~rows.visual), rows.only(rows.visual)
        for layer, seen in enumerate(sees):
            here = dense_layer(text.joined(vision) if seen else text, layer, places)
            text = here.only(~here.visual)
            vision = here.only(here.visual) if seen else vision
        return logits_of(text), []

    return forward


def hidrop(
    entry: int,
    edges: tuple[int, ...],
    keep: tuple[int, ...],
    exit_: int,
    positions: str = "original",
    bug: str = "",
) -> Method:
    """HiDrop; ``bug``: a mistake that a test plants."""

    def forward(rows: Rows, count: int, kept: Chosen | None) -> tuple[Tensor, Chosen]:
        text, vision = rows.only(~rows.visual), rows.only(rows.visual)
        first, size = int(vision.place[0]), len(vision.place)
        at = torch.arange(len(rows.place))
        moved = at - size * (at >= first + size)
        if positions == "separate":
            at = moved
        elif bug == "decoded behind the text":
            at = torch.where(at >= count, moved, at)
        late = bug == "edges one later"
        done: Chosen = []
        for layer in range(LAYERS):
            here = text if layer < entry or not len(vision.x) else text.joined(vision)
            if bug == "conditioned rows":
                here = text.joined(vision)
            if layer - late in edges:
                k = keep[edges.index(layer - late)]
                order = _best(here, layer - (bug == "the layer before"), count, at, k, bug)
                order = torch.tensor(kept[len(done)]) if kept else order
                done.append(sorted(order.tolist()))
                vision = here.only(torch.isin(here.place, order))
                if bug == "sorted by score":
                    vision.x = here.x[
                        torch.stack([(here.place == o).nonzero()[0, 0] for o in order])
                    ]
                if positions == "renumbered":
                    at = at.clone()
                    at[vision.place] = first + torch.arange(k)
                here = text.joined(vision)
            if layer == exit_ + (bug == "exit one later"):
                vision = vision.only(vision.visual & False)
                here = text
            hole = moved if bug == "no hole" and layer < entry else at
            here = dense_layer(here, layer, lambda r, hole=hole: hole[r.place])
            text = here.only(~here.visual)
            if layer >= entry or bug == "conditioned rows":
                vision = here.only(here.visual)
        return logits_of(text), done

    return forward


def vica(seeing: tuple[int, ...], prefix: str = "frozen", bug: str = "") -> Method:
    """ViCA: raw visual rows are keys and values of the layers ``seeing``, and change nowhere.

    ``prefix``: frozen, or updated by attention; ``bug``: a mistake that a test plants.
    """

    def forward(rows: Rows, count: int, kept: Chosen | None) -> tuple[Tensor, Chosen]:
        text, vision = rows.only(~rows.visual), rows.only(rows.visual)
        first, size = int(vision.place[0]), len(vision.place)
        before = (text.place < first)[:, None]
        closed = torch.arange(len(rows.place))
        closed = closed - size * (closed >= first + size)
        for layer in range(LAYERS):
            sees, gate = layer in seeing, None
            keys = text.joined(vision) if sees else text
            if bug == "gated after the softmax" and not sees:
                keys = text.joined(vision)
                gate = 1 - keys.visual.float()
            hole = bug != "closed in text-only layers" or sees
            at = places if hole else lambda r: closed[r.place]
            update = attention(text, keys, layer, at, gate)
            if prefix == "frozen":
                update = update.masked_fill(before, 0)
            if bug == "vision is updated by attention" and sees:
                vision.x = vision.x + attention(vision, keys, layer, places)
            if bug == "vision goes through MLPs" and sees:
                vision.x = vision.x + mlp(vision.x, layer)
            x = text.x + update
            change = mlp(x, layer)
            if bug == "the prefix's MLP is frozen":
                change = change.masked_fill(before, 0)
            text = Rows(x + change, text.place, text.visual)
        return logits_of(text), []

    return forward


def _best(here: Rows, layer: int, count: int, at: Tensor, k: int, bug: str) -> Tensor:
    """Return the places of the K visual rows that the prompt's last row attends to most."""
    here = here.only(here.place < count)
    x = norm(here.x, weight(layer, "input_layernorm"), 1e-5)
    q = heads(x, layer, "q_proj", at[here.place])[:, -1:]
    scores = q @ heads(x, layer, "k_proj", at[here.place]).transpose(1, 2) / q.shape[-1] ** 0.5
    if bug == "softmax over vision":
        scores = scores.masked_fill(~here.visual, -torch.inf)
    mean = scores.softmax(-1).mean(0)[0][here.visual]
    return here.place[here.visual][mean.topk(k).indices]


def error(found, wanted: Answer) -> float:
    """The largest error of any logit of any step, in spreads of the logits."""
    worst = (found.step_logits[0] - wanted.logits).abs().max()
    return float(worst / wanted.logits.std())


def agree(found, wanted: Answer) -> None:
    assert error(found, wanted) < 1e-4
    assert found.tokens[0].tolist() == wanted.tokens
    assert found.kept_at_edges[0] == wanted.kept
    assert len(set(wanted.tokens)) > 3  # else a wrong model agrees by repeating itself


def differ(found, wanted: Answer, least: float = 1e-2) -> None:
    """A mistake is noticed in some step."""
    assert error(found, wanted) > least
