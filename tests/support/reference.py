"""The static VisiPruner method, written to be obvious: the judge of the chain.

Whole sequences, no cache, eager attention, masks applied to the probabilities after the softmax,
contributions as full tensors, pruned rows gathered away (docs/methods.md, "VisiPruner: shallow
layers" and "VisiPruner: static plans"). It shares no code with the stages.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Static:
    """Layers 0..s-1 are text-blind (layer 0 is the sink), K survive layer t, none survives e.

    ``template`` "13b": in layer 0 text loses the first half of the picture, nothing is merged.
    ``renorm``: masked before the softmax. ``decode_sees``: decoded rows are not blind.
    """

    shallow: int
    trigger: int
    exit: int
    keep: int
    score: str = "value_norm"
    template: str = "7b"
    renorm: bool = False
    decode_sees: bool = False


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x, positions, theta):
    """x: (H, n, d)."""
    width = x.shape[-1]
    angle = positions[:, None] / theta ** (torch.arange(0, width, 2) / width)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def forward(weights, config, embeds, visual, method, probe=None, kept=None, added=None):
    """One sample. embeds: (S, D); visual: (S,) bool. Returns logits of the last row and kept rows.

    ``added``: by layer, (S, D) that are added to the rows at its input. ``probe`` is the row that
    selects (the prompt's last); ``kept`` fixes an earlier selection.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    probe = len(embeds) - 1 if probe is None else probe
    rows = torch.arange(len(embeds))
    x = embeds
    for layer in range(config["num_hidden_layers"]):

        def w(name, layer=layer):
            return weights[f"model.layers.{layer}.{name}.weight"]

        n = len(rows)
        if added and layer in added:
            x = x + added[layer][rows]
        h = norm(x, w("input_layernorm"), eps)
        q = rope((h @ w("self_attn.q_proj").T).view(n, heads, width).transpose(0, 1), rows, theta)
        k = rope((h @ w("self_attn.k_proj").T).view(n, groups, width).transpose(0, 1), rows, theta)
        v = (h @ w("self_attn.v_proj").T).view(n, groups, width).transpose(0, 1)
        k = k.repeat_interleave(heads // groups, 0)
        v = v.repeat_interleave(heads // groups, 0)
        scores = q @ k.transpose(1, 2) / width**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        a = scores.softmax(-1)

        seen = visual[rows]
        if method and layer < method.shallow and seen.any():
            first = int(seen.nonzero()[0])
            text = ~seen & (torch.arange(n) > first)
            if method.decode_sees:
                text &= rows <= probe
            lost = seen.clone()
            if layer == 0 and method.template == "13b":
                lost[first + int(seen.sum()) // 2 :] = False
            hidden = text[:, None] & lost[None, :]
            if layer == 0:
                hidden |= seen[:, None] & seen[None, :]
            if method.renorm:
                a = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            else:
                removed = (a * hidden).sum(-1)
                a = a.masked_fill(hidden, 0)
                if layer == 0 and method.template == "7b":
                    a[:, text, first] = removed[:, text]
        out = (a @ v).transpose(0, 1).reshape(n, -1)

        if method and layer == method.trigger and kept is None and seen.any():
            last = int((rows == probe).nonzero())
            if method.score == "value_norm":
                contributions = a[:, last, :, None] * v  # (H, n, d)
                score = contributions.transpose(0, 1).reshape(n, -1).norm(dim=1)
            elif method.score == "sparsevlm":
                asking = (rows > rows[seen].max()) & (rows <= probe)
                own = a.mean(0)[asking]
                mass = own[:, seen].sum(1)
                score = own[mass >= mass.mean()].mean(0)
            else:
                score = a[:, last].mean(0)

        before = x
        x = x + out @ w("self_attn.o_proj").T
        h = norm(x, w("post_attention_layernorm"), eps)
        gate = h @ w("mlp.gate_proj").T
        x = x + (gate * gate.sigmoid() * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T

        if method and layer == method.trigger and kept is None and seen.any():
            if method.score == "v2drop":
                score = (x - before).norm(dim=1)
            best = score[seen].topk(method.keep).indices
            kept = rows[seen][best].sort().values
        if method and layer in (method.trigger, method.exit) and seen.any():
            keep = kept if layer == method.trigger and method.exit > layer else rows[:0]
            stays = ~seen | torch.isin(rows, keep)
            rows, x = rows[stays], x[stays]
    last = norm(x[-1], weights["model.norm.weight"], eps)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return head @ last, kept


def generate(weights, config, embeds, visual, method, new_tokens):
    """Greedy tokens with the prompt's selection, by running the whole sequence every time."""
    logits, kept = forward(weights, config, embeds, visual, method)
    first, tokens, probe = logits, [], len(embeds) - 1
    for _ in range(new_tokens):
        tokens.append(int(logits.argmax()))
        row = weights["model.embed_tokens.weight"][tokens[-1]][None]
        embeds = torch.cat((embeds, row))
        visual = torch.cat((visual, torch.tensor([False])))
        logits, _ = forward(weights, config, embeds, visual, method, probe, kept)
    return first, kept, tokens
