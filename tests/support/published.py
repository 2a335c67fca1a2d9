"""VisiPruner as published, written to be obvious: the judge of the plans that decide per prompt.

Whole sequences, no cache, eager attention, masks applied to the probabilities after the softmax,
every token's contribution as a full tensor, pruned rows gathered away. Written from
docs/methods.md, "VisiPruner: decision rules" and "VisiPruner: paper and code"; it shares no code
with the stages. ``CODE`` and ``PAPER`` are the two methods; every field is a place where they
differ or a number that they set.
"""

from dataclasses import dataclass, field, replace

import torch

from .reference import norm, rope


@dataclass(frozen=True)
class Method:
    """One variant of the method. Layers count from 0.

    shallow: number of text-blind layers, layer 0 among them; 0 without the shallow part.
    probe: first layer whose probe counts (the code leaves a gap of one dense layer before it).
    middle, deep: whether tokens are selected, and whether the selected ones may leave.
    layer0: "merge" puts the removed mass on one visual token, "half" drops the first half (13B).
    merge_into: which visual token takes the mass: the first, or a random one by this seed.
    visual_self_attention: whether visual rows see each other in layers 1 to shallow - 1.
    strict: keep where |c| > contribution; otherwise >=.
    cumulative: quiet layers are counted over all; otherwise they must follow each other.
    decode_sees: whether decoded rows see the picture in the text-blind layers.
    whole_leaves: whether vision can leave where every token was kept (the code gathers all its
        rows again in each later layer, and never comes to the branch that drops them).
    edges: the layers after which anything can take effect; None: after each. Not published.
    """

    shallow: int = 6
    probe: int = 7
    middle: bool = True
    deep: bool = True
    cosine: float = 0.995
    contribution: float = 0.2
    exit_cosine: float = 0.999
    exit_layers: int = 2
    layer0: str = "merge"
    merge_into: int | None = None
    visual_self_attention: bool = True
    strict: bool = True
    cumulative: bool = True
    decode_sees: bool = True
    whole_leaves: bool = False
    edges: tuple[int, ...] | None = None


CODE = Method()
PAPER = replace(
    CODE,
    shallow=7,
    visual_self_attention=False,
    strict=False,
    cumulative=False,
    decode_sees=False,
    whole_leaves=True,
)


@dataclass
class Trace:
    """What happened: t, e (last layers with all and with any visual tokens), kept rows, probes.

    called, left: the layers whose probes called for a selection and an exit; they are t and e where
    an edge follows each layer.
    """

    trigger: int | None = None
    exit: int | None = None
    called: int | None = None
    left: int | None = None
    kept: torch.Tensor | None = None
    cosines: dict = field(default_factory=dict)  # layer -> (visual tokens there,)
    norms: dict = field(default_factory=dict)


def forward(weights, config, embeds, visual, method, decided=None, prompt=None):
    """One sample. embeds: (S, D); visual: (S,) bool. Returns the last row's logits and a trace.

    With ``decided``, an earlier trace of the same prompt, nothing is probed: its decisions hold.
    ``prompt`` is the number of rows of the prompt, all of them by default.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    depth = config["num_hidden_layers"]
    prompt = len(embeds) if prompt is None else prompt
    trace = Trace()
    quiet, kept_all = 0, False
    edges = range(depth - 1) if method.edges is None else method.edges
    rows = torch.arange(len(embeds))
    x = embeds
    for layer in range(depth):

        def w(name, layer=layer):
            return weights[f"model.layers.{layer}.{name}.weight"]

        n = len(rows)
        seen = visual[rows]
        if seen.any():
            trace.exit = layer
        h = norm(x, w("input_layernorm"), eps)
        q = rope((h @ w("self_attn.q_proj").T).view(n, heads, width).transpose(0, 1), rows, theta)
        k = rope((h @ w("self_attn.k_proj").T).view(n, groups, width).transpose(0, 1), rows, theta)
        v = (h @ w("self_attn.v_proj").T).view(n, groups, width).transpose(0, 1)
        k = k.repeat_interleave(heads // groups, 0)
        v = v.repeat_interleave(heads // groups, 0)
        scores = q @ k.transpose(1, 2) / width**0.5
        a = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        if layer < method.shallow and seen.any():
            a = shallow(a, layer, rows, seen, method, prompt)
        out = (a @ v).transpose(0, 1).reshape(n, -1)

        leave = None
        if decided is not None:
            if decided.trigger == layer:
                leave = seen & ~torch.isin(rows, decided.kept)
            if decided.exit == layer:
                leave = seen
        elif method.middle and seen.any() and method.probe <= layer <= max(edges):
            contribution = (a[:, -1, :, None] * v).transpose(0, 1).reshape(n, -1)[seen]
            o = out[-1]
            without = o - contribution
            cosine = without @ o / (without.norm(dim=1) * o.norm())
            length = contribution.norm(dim=1)
            trace.cosines[layer], trace.norms[layer] = cosine, length
            if trace.called is None:
                if (cosine < method.cosine).any():
                    strong = length > method.contribution
                    if not method.strict:
                        strong = length >= method.contribution
                    trace.called = layer
                    trace.kept = rows[seen][strong]
                    kept_all = bool(strong.all())
            elif method.deep and trace.left is None and (method.whole_leaves or not kept_all):
                if (cosine[torch.isin(rows[seen], trace.kept)] >= method.exit_cosine).all():
                    quiet += 1
                elif not method.cumulative:
                    quiet = 0
                if quiet == method.exit_layers:
                    trace.left = layer
        if decided is None and layer in edges and seen.any():
            if trace.called is not None and trace.trigger is None:
                trace.trigger = layer
                leave = seen & ~torch.isin(rows, trace.kept)
            if trace.left is not None:
                leave = seen

        x = x + out @ w("self_attn.o_proj").T
        h = norm(x, w("post_attention_layernorm"), eps)
        gate = h @ w("mlp.gate_proj").T
        x = x + (gate * gate.sigmoid() * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
        if leave is not None:
            rows, x = rows[~leave], x[~leave]
    last = norm(x[-1], weights["model.norm.weight"], eps)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return head @ last, trace


def shallow(a, layer, rows, seen, method, prompt):
    """Probabilities (H, n, n) of a text-blind layer: columns are zeroed, nothing is renormalised.

    The released code speaks of rows from 35 on, the end of its prompt's prefix; here that is every
    row after the first visual one. Text between two pictures is text.
    """
    a = a.clone()
    n = len(rows)
    places = seen.nonzero()[:, 0]
    first = int(places[0])
    text = ~seen & (torch.arange(n) > first)
    if method.decode_sees:
        text &= rows < prompt
    if layer > 0:
        a[:, text[:, None] & seen[None]] = 0
        if not method.visual_self_attention:
            a[:, seen[:, None] & seen[None]] = 0
        return a
    removed = (a * seen).sum(-1)  # (H, n)
    lost = seen[None].repeat(n, 1)
    if method.layer0 == "half":
        for row in range(n):  # half of what it could see: the code's half after the last picture
            before = places[places < row]
            lost[row, before[len(before) // 2 :]] = False
    a[:, text[:, None] & lost] = 0
    a[:, seen[:, None] & seen[None]] = 0
    if method.layer0 == "merge":
        target = first
        if method.merge_into is not None:
            generator = torch.Generator().manual_seed(method.merge_into)
            target = int(places[torch.randint(len(places), (), generator=generator)])
        # Text between two pictures cannot see a target that comes after it.
        takes = text & (torch.arange(n) > target)
        a[:, takes, target] = removed[:, takes]
    return a


def generate(weights, config, embeds, visual, method, new_tokens):
    """Logits of the prompt, its trace, and greedy tokens under the prompt's decisions."""
    logits, trace = forward(weights, config, embeds, visual, method)
    first, tokens, prompt = logits, [], len(embeds)
    for _ in range(new_tokens):
        tokens.append(int(logits.argmax()))
        row = weights["model.embed_tokens.weight"][tokens[-1]][None]
        embeds = torch.cat((embeds, row))
        visual = torch.cat((visual, torch.tensor([False])))
        logits, _ = forward(weights, config, embeds, visual, method, trace, prompt)
    return first, trace, tokens


def visual_macs(full, kept, tokens, n=576, d=4096, m=11008, attention=True):
    """MACs of the visual rows: ``full`` layers with n of them, ``kept`` with ``tokens``.

    docs/methods.md, "Cost accounting"; without ``attention`` the n^2 term of the full layers is
    left out, as in the paper's own figures.
    """

    def layer(count, pairs):
        return 4 * count * d * d + 2 * pairs * d + 3 * count * d * m

    return full * layer(n, n * n * attention) + kept * layer(tokens, tokens * tokens)
