"""A Llama layer over one sequence, written to be obvious: the judge of plans that skip or freeze.

Tests compose whole methods of it, row by row and layer by layer. It shares no code with the stages.
"""

import torch

from .reference import norm, rope


class Plain:
    """A decoder whose layers are called one by one; ``keys``, ``values``: caches by layer."""

    def __init__(self, weights, config):
        self.weights, self.config = weights, config
        self.depth = config["num_hidden_layers"]
        self.keys, self.values = [None] * self.depth, [None] * self.depth

    def layer(self, index, x, positions, gains=(1, 1), edit=None):
        """Rows (n, D) behind layer ``index``, which sees what its cache holds and earlier rows.

        gains: factors of the updates of attention and MLP, numbers or (n,); None: there is no such
        half, nor its cache. edit: changes probabilities (H, n, keys) after the softmax.
        """
        attention, mlp = gains
        eps, theta = self.config["rms_norm_eps"], self.config["rope_theta"]

        def w(name):
            return self.weights[f"model.layers.{index}.{name}.weight"]

        def factor(gain):
            return torch.as_tensor(gain, dtype=x.dtype).expand(len(x))[:, None]

        if attention is not None:
            h = norm(x, w("input_layernorm"), eps)
            probs, v = self._attend(index, h, positions, theta, w)
            probs = probs if edit is None else edit(probs)
            out = (probs @ v).transpose(0, 1).reshape(len(x), -1)
            x = x + factor(attention) * (out @ w("self_attn.o_proj").T)
        if mlp is not None:
            h = norm(x, w("post_attention_layernorm"), eps)
            gate = h @ w("mlp.gate_proj").T
            update = (gate * gate.sigmoid() * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
            x = x + factor(mlp) * update
        return x

    def _attend(self, index, h, positions, theta, w):
        heads, groups = (self.config[f"num_{n}_heads"] for n in ("attention", "key_value"))
        width = self.config.get("head_dim") or self.config["hidden_size"] // heads
        q, k, v = (
            (h @ w(f"self_attn.{name}_proj").T).view(len(h), -1, width).transpose(0, 1)
            for name in "qkv"
        )
        q, k = rope(q, positions, theta), rope(k, positions, theta)
        if self.keys[index] is not None:
            k = torch.cat((self.keys[index], k), 1)
            v = torch.cat((self.values[index], v), 1)
        self.keys[index], self.values[index] = k, v
        k, v = k.repeat_interleave(heads // groups, 0), v.repeat_interleave(heads // groups, 0)
        later = torch.ones(len(h), k.shape[1]).triu(1 + k.shape[1] - len(h)).bool()
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(later, -torch.inf)
        return scores.softmax(-1), v

    def logits(self, x):
        """(V,) of the last row."""
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        last = norm(x[-1], self.weights["model.norm.weight"], self.config["rms_norm_eps"])
        return head @ last

    def embed(self, token):
        """(1, D)."""
        return self.weights["model.embed_tokens.weight"][token][None]


def answer(plain, logits, position, steps, gains=None):
    """Logits (1 + steps, V) of greedy decoding after a prefill; ``gains`` by layer, as above."""
    out, tokens = [logits], []
    for step in range(steps):
        tokens.append(int(out[-1].argmax()))
        x = plain.embed(tokens[-1])
        for index in range(plain.depth):
            own = (1, 1) if gains is None else gains(index)
            x = plain.layer(index, x, torch.tensor([position + step]), own)
        out.append(plain.logits(x))
    return torch.stack(out), tokens
