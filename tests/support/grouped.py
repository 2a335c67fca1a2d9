"""Group positions written to be obvious: whole sequences under a mask, and the wait-k mask.

Source: docs/methods.md, "Group positions".
"""

from dataclasses import dataclass, field

import torch

from .reference import norm, rope


@torch.no_grad()
def forward(weights, config, embeds, positions, mask):
    """Logits (S, V) of rows (S, D) at ``positions``; ``mask`` (S, S): who sees whom."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, eps = config["hidden_size"] // heads, config["rms_norm_eps"]
    count, x = len(embeds), embeds
    for layer in range(config["num_hidden_layers"]):

        def w(name, layer=layer):
            return weights[f"model.layers.{layer}.{name}.weight"]

        def split(name, of, h, w=w):
            return (h @ w(f"self_attn.{name}_proj").T).view(count, of, width).transpose(0, 1)

        h = norm(x, w("input_layernorm"), eps)
        q = rope(split("q", heads, h), positions, config["rope_theta"])
        k = rope(split("k", groups, h), positions, config["rope_theta"])
        k, v = (own.repeat_interleave(heads // groups, 0) for own in (k, split("v", groups, h)))
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(~mask, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
        x = x + out @ w("self_attn.o_proj").T
        h = norm(x, w("post_attention_layernorm"), eps)
        gate = h @ w("mlp.gate_proj").T
        x = x + (gate * gate.sigmoid() * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


@dataclass
class Grouped:
    """Rows as they were read (r) and written (w) in turn: ``turns`` such as "rrwrw".

    Mistakes: ``by_id`` lets a row see the rows of no larger id; ``blind`` hides nothing of what is
    written from what is read later; ``early`` lets written rows see what is read later;
    ``together`` counts the ids of both as one.
    """

    turns: str
    phi: int = 0
    mistakes: tuple = field(default_factory=tuple)

    def positions(self):
        counts, out = {"r": 0, "w": self.phi}, []
        for place, turn in enumerate(self.turns):
            out.append(place if "together" in self.mistakes else counts[turn])
            counts[turn] += 1
        return torch.tensor(out)

    def mask(self):
        count = len(self.turns)
        mask = torch.ones(count, count).tril().bool()
        ids = self.positions()
        for row, turn in enumerate(self.turns):
            for other, kind in enumerate(self.turns):
                if turn == "r" and kind == "w" and "blind" not in self.mistakes:
                    mask[row, other] = False
                if turn == "w" and kind == "r" and "early" in self.mistakes:
                    mask[row, other] = True
                if "by_id" in self.mistakes and other < row:
                    mask[row, other] &= bool(ids[other] <= ids[row])
        return mask


def wait_k(source, target, k):
    """Return how many rows of the source each row of the target sees, by the rows of their units.

    The first unit of either is its prompt. Unit j of the target sees the first k + j units of the
    source, and the row that predicts a token is the one before it.
    """
    sees = [sum(source[: k + unit]) for unit, rows in enumerate(target) for _ in range(rows)]
    return [*sees[1:], *sees[-1:]]
