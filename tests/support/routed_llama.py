"""Llama with routers, written out row by row: what routed plans are held against.

No stages, no caches that are written in place, no operators of ours: a prompt is a list of rows,
and every step reads the keys and values of all rows before it. The rules are those of
docs/methods.md, "Routed depth"; ``Rules`` plants mistakes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Rules:
    """Parts of the rules, each of which a test does wrong once."""

    raw: bool = True  # routers read the raw residual, not normalised rows
    mlp_on_input: bool = True  # the MLP's router reads what entered the layer
    skipped_cached: bool = True  # keys and values of skipped rows are kept
    execute: int = 0  # index of the number that stands for execution
    strict: bool = True  # MoD: above the threshold, not as much as it


RIGHT = Rules()


def weights_of(config, kind, seed=0):
    """Return scaled random weights of a decoder and its routers, by released names."""
    d, m, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = d // heads
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape, gain=1.0):
        return gain * torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    found = {
        "model.embed_tokens.weight": 0.3 * torch.randn(config["vocab_size"], d, generator=generator)
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}self_attn.q_proj.weight": noise(heads * width, d, gain=2.0),
            f"{at}self_attn.k_proj.weight": noise(groups * width, d, gain=2.0),
            f"{at}self_attn.v_proj.weight": noise(groups * width, d),
            f"{at}self_attn.o_proj.weight": noise(d, heads * width),
            f"{at}mlp.gate_proj.weight": noise(m, d),
            f"{at}mlp.up_proj.weight": noise(m, d),
            f"{at}mlp.down_proj.weight": noise(d, m),
            f"{at}input_layernorm.weight": 1 + 0.3 * torch.randn(d, generator=generator),
            f"{at}post_attention_layernorm.weight": 1 + 0.3 * torch.randn(d, generator=generator),
        }
        if kind == "mod" and layer in (0, layers - 1):
            continue
        names, outputs = {
            "skipgpt": (("router_attention", "router_mlp"), 2),
            "skipgpt-lrm": (("router_attention", "router_mlp"), 2),
            "dllm": (("router_block",), 2),
            "mod": (("router", "router_mlp"), 1),
        }[kind]
        for name in names:
            inputs = d
            if kind == "skipgpt":
                inputs = d // 4
                found[f"{at}{name}.hidden_layer.weight"] = noise(inputs, d)
                found[f"{at}{name}.hidden_layer.bias"] = noise(inputs)
            found[f"{at}{name}.weight_predictor.weight"] = noise(outputs, inputs)
            found[f"{at}{name}.weight_predictor.bias"] = 0.1 * noise(outputs)
    found["model.norm.weight"] = 1 + 0.1 * torch.randn(d, generator=generator)
    found["lm_head.weight"] = noise(config["vocab_size"], d, gain=4.0)
    return found


class RoutedLlama:
    """One sample of a Llama with routers of a kind; ``gates`` notes (rows,) factors by router."""

    def __init__(self, config, weights, kind, sparsity=None, rules=RIGHT):
        self.config, self.weights, self.kind = config, weights, kind
        self.sparsity, self.rules = sparsity, rules
        self.cached = [([], []) for _ in range(config["num_hidden_layers"])]
        self.seen = 0
        self.gates = {}

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.weights[f"{name}.weight"] * x * scale

    def gate(self, name, x):
        """Return the factor of each of rows x (Q, D)."""
        if self.kind == "mod":
            w = self.linear(f"{name}.weight_predictor", x)[:, 0]
            k = max(1, int((1 - self.sparsity) * len(w)))
            threshold = w.sort(descending=True).values[k - 1]
            runs = w > threshold if self.rules.strict and k > 1 else w >= threshold
            found = torch.where(runs, w, 0.0)
        else:
            if self.kind == "skipgpt":
                x = F.relu(self.linear(f"{name}.hidden_layer", x))
            numbers = self.linear(f"{name}.weight_predictor", x)
            found = (numbers.argmax(-1) == self.rules.execute).float()
        self.gates.setdefault(name, []).append(found)
        return found[:, None]

    def attention(self, layer, x, kept):
        """Return attention's output for normalised rows x (Q, D) behind those that are cached."""
        at = f"model.layers.{layer}.self_attn."
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = self.config["hidden_size"] // heads
        positions = torch.arange(self.seen, self.seen + len(x))
        q = turned(self.linear(f"{at}q_proj", x).view(len(x), heads, width), positions)
        k = turned(self.linear(f"{at}k_proj", x).view(len(x), groups, width), positions)
        v = self.linear(f"{at}v_proj", x).view(len(x), groups, width)
        held = self.cached[layer]
        for row in range(len(x)):
            held[0].append((int(positions[row]), k[row], bool(kept[row])))
            held[1].append(v[row])
        out = []
        for row, position in enumerate(positions.tolist()):
            seen = [
                i
                for i, (at_, _, stays) in enumerate(held[0])
                if at_ <= position and (stays or at_ == position)
            ]
            mine_k = torch.stack([held[0][i][1] for i in seen]).repeat_interleave(
                heads // groups, 1
            )
            mine_v = torch.stack([held[1][i] for i in seen]).repeat_interleave(heads // groups, 1)
            scores = torch.einsum("hd,shd->hs", q[row], mine_k) / width**0.5
            out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), mine_v).flatten())
        return self.linear(f"{at}o_proj", torch.stack(out))

    def mlp(self, layer, x):
        at = f"model.layers.{layer}.mlp."
        return self.linear(
            f"{at}down_proj",
            F.silu(self.linear(f"{at}gate_proj", x)) * self.linear(f"{at}up_proj", x),
        )

    def __call__(self, rows):
        """Run rows (Q, D) behind those seen before; return the logits (V,) of the last one."""
        x = rows
        last = self.config["num_hidden_layers"] - 1
        for layer in range(last + 1):
            at = f"model.layers.{layer}."
            read = x if self.rules.raw else self.norm(f"{at}input_layernorm", x)
            if self.kind == "mod" and layer in (0, last):
                first = second = torch.ones(len(x), 1)
            elif self.kind == "dllm":
                first = second = self.gate(f"{at}router_block", read)
            else:
                name = "router" if self.kind == "mod" else "router_attention"
                first, second = self.gate(at + name, read), None
                if self.rules.mlp_on_input:
                    second = self.gate(f"{at}router_mlp", read)
            kept = torch.ones(len(x)) if self.rules.skipped_cached else first[:, 0]
            y = x + first * self.attention(layer, self.norm(f"{at}input_layernorm", x), kept)
            if second is None:
                second = self.gate(f"{at}router_mlp", y)
            x = y + second * self.mlp(layer, self.norm(f"{at}post_attention_layernorm", y))
        self.seen += len(rows)
        return self.linear("lm_head", self.norm("model.norm", x[-1]))

    def answer(self, rows, steps, tokens=None):
        """Return the logits (1 + steps, V) of the prompt's last row and of decode steps, greedy or
        along ``tokens``.
        """
        logits = [self(rows)]
        for step in range(steps):
            token = int(logits[-1].argmax()) if tokens is None else tokens[step]
            logits.append(self(self.weights["model.embed_tokens.weight"][token][None]))
        return torch.stack(logits)


def turned(x, positions):
    """Rotate x (Q, H, d) by its positions (Q,), base 10000, halves apart."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
