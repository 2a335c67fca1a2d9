"""The forward pass of training: many questions behind one image, each blind to the others.

The image's rows are computed once; each question continues from them as if it were alone, with
the positions it would have alone. So all questions share the cost of their image.

    prefix + image    ---+--- question 1 + answer
      (B, P + N, D)      +--- question 2 + answer       suffixes: (B, Q, T, D)
                         +--- ...

`TrainStages` says which layers see the image, so that training practises what the compiler does:
text that ignores the image at first, and no image at all in the deep layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainStages:
    """The layers that read the image.

    Attributes:
        blind: text rows ignore the image in layers 0 .. blind - 1 (gated, not renormalised); in
            layer 0 the mass lost goes to the first visual token's value, and visual rows see the
            prefix only.
        select_after: after this layer only `keep` visual rows go on.
        keep: number of visual rows kept: random ones in training, the strongest contributions
            where `top` is set.
        last: the last layer with visual rows in it.
        top: choose by the norm of the contribution to the last prompt row (one question per image).
    """

    blind: int = 0
    select_after: int = 99
    keep: int = 0
    last: int = 99
    top: bool = False


DENSE_STAGES = TrainStages()
PLAN_STAGES = TrainStages(blind=2, select_after=4, keep=16, last=6, top=True)


def rope_tables(length: int, head: int, theta: float = 10000.0):
    """Return cosines and sines, each (length, head), in the half-split layout of Llama."""
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, head, 2) / head)[None]
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Return heads `x` (..., head) turned by their positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def visual_features(model, pixels):
    """Return projected features of `pixels` (B, 3, H, W): (B, N, D); no unused layer runs."""
    return model.model.multi_modal_projector(encoder_features(model, pixels)[:, 1:])


def encoder_features(model, pixels):
    """Return hidden states of the last used vision layer, class token included: (B, 1 + N, C)."""
    vision_encoder = model.model.vision_tower
    hidden = vision_encoder.pre_layrnorm(vision_encoder.embeddings(pixels))
    for layer in vision_encoder.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def forward(
    model,
    features,
    prefix_ids,
    suffixes,
    staging: TrainStages = DENSE_STAGES,
    last_row=None,
    log=None,
    states=None,
    entering=None,
    close_up=False,
):
    """Return final hidden states of all suffix rows, one (B, Q, T, D) for each of `suffixes`.

    Args:
        model: LlavaForConditionalGeneration.
        features: (B, N, D) projected features.
        prefix_ids: (P,) token ids before the image.
        suffixes: token ids after it, padded at the end: a list of (B, Q, T), each with a Q and T of
            its own, so that short questions need not be padded to the longest.
        staging: the layers that read the image.
        last_row: (B,) index of the last prompt row within T; only for `staging.top`.
        log: where given, a list that takes each layer's attention masses, one a band.
        states: where given, a list that takes the text rows after each layer, one a band.
        entering: (B, n) the visual rows that come in, in ascending order; all where None.
        close_up: whether what comes in is numbered anew, the text right after it.
    """
    lm = model.model.language_model
    heads = lm.config.num_attention_heads
    batch, visual, width = features.shape
    front, head = prefix_ids.shape[0], width // heads
    start, places = front + visual, torch.arange(front + visual).expand(batch, -1)
    if entering is not None:
        features = features.gather(1, entering[..., None].expand(-1, -1, width))
        visual = entering.shape[1]
        if close_up:
            start = front + visual
        moved = torch.arange(front, start).expand(batch, -1) if close_up else front + entering
        places = torch.cat((places[:, :front], moved), 1)
    image = torch.cat((lm.embed_tokens(prefix_ids).expand(batch, -1, -1), features), 1)
    text = torch.cat([lm.embed_tokens(ids).view(batch, -1, width) for ids in suffixes], 1)
    longest = max(ids.shape[2] for ids in suffixes)
    tables = rope_tables(start + longest, head, lm.config.rope_parameters["rope_theta"])
    tables = [table.to(features.dtype) for table in tables]
    text_cos, text_sin = (
        torch.cat([x[start : start + i.shape[2]].repeat(i.shape[1], 1) for i in suffixes])
        for x in tables
    )
    cos, sin = (x[places][:, None] for x in tables)
    lengths = [ids.shape[1] * ids.shape[2] for ids in suffixes]

    def split(x):
        return x.view(batch, -1, heads, head).transpose(1, 2)

    def finish(layer, x, mixed):
        x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).reshape(batch, -1, width))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    for index, layer in enumerate(lm.layers):
        if index > staging.last:
            image, cos, sin = image[:, :front], cos[:, :, :front], sin[:, :, :front]
        attn = layer.self_attn
        p, t = layer.input_layernorm(image), layer.input_layernorm(text)
        kp, vp = rotate(split(attn.k_proj(p)), cos, sin), split(attn.v_proj(p))
        qt = rotate(split(attn.q_proj(t)), text_cos, text_sin) * head**-0.5
        kt, vt = rotate(split(attn.k_proj(t)), text_cos, text_sin), split(attn.v_proj(t))

        parts = zip(suffixes, *(x.split(lengths, 2) for x in (qt, kt, vt)), strict=True)
        mixes, masses = [], []
        for ids, q, k, v in parts:
            mass, mixed = _read(q, k, v, kp, vp, ids.shape[1:], front, index, staging)
            mixes.append(mixed)
            masses.append(mass)
        if log is not None:
            log.append(masses)
        chosen = None
        if index == staging.select_after and staging.keep:
            if staging.top:
                chosen = _strongest(masses[0], vp[:, :, front:], last_row, staging.keep)
            else:
                chosen = torch.rand(batch, visual).topk(staging.keep, -1).indices
            chosen = chosen.sort(-1).values + front

        text = finish(layer, text, torch.cat(mixes, 2))
        if states is not None:
            states.append(text.split(lengths, 1))
        if index == len(lm.layers) - 1:
            break
        alone = index >= staging.last or (index == staging.select_after and not staging.keep)
        stop = front if alone else None
        qp = rotate(split(attn.q_proj(p[:, :stop])), cos[:, :, :stop], sin[:, :, :stop])
        qp = qp * head**-0.5
        # Written out: on a CPU the fused kernel's backward pass in BF16 is five times slower.
        mass = qp @ kp[:, :, :stop].transpose(-1, -2)
        later = torch.ones(mass.shape[-2:]).triu(1).bool()
        mass = mass.masked_fill_(later, -1e9).softmax(-1)
        seen = front if index == 0 and staging.blind else mass.shape[-1]
        mixed = mass[..., :seen] @ vp[:, :, :seen]
        image = finish(layer, image[:, :stop], mixed)
        cos, sin = cos[:, :, :stop], sin[:, :, :stop]
        if chosen is not None:
            kept = torch.cat((torch.arange(front).expand(batch, -1), chosen), 1)
            image = image.gather(1, kept[..., None].expand(-1, -1, width))
            places = kept[:, None, :, None].expand(-1, -1, -1, head)
            cos, sin = cos.gather(2, places), sin.gather(2, places)
    hidden = lm.norm(text).split(lengths, 1)
    return [x.view(*ids.shape, width) for x, ids in zip(hidden, suffixes, strict=True)]


def _read(q, k, v, kp, vp, shape, front: int, index: int, staging: TrainStages):
    """Return what rows of `shape` (Q, T) take from the image and their own question.

    `q` is scaled already. Attention masses come first, then the mixed values.
    """
    batch, heads, _, head = q.shape
    asked, rows = shape
    blocks = (batch, heads, asked, rows, head)
    own = q.reshape(blocks) @ k.reshape(blocks).transpose(-1, -2)
    own = own.masked_fill_(torch.ones(rows, rows).triu(1).bool(), -1e9)
    scores = torch.cat((q @ kp.transpose(-1, -2), own.view(batch, heads, -1, rows)), -1)
    mass = scores.softmax(-1)
    on_image, own = mass.split((kp.shape[2], rows), -1)
    mixed = (own.reshape(batch, heads, asked, rows, rows) @ v.reshape(blocks)).view(q.shape)
    if index >= staging.blind:
        return mass, mixed + on_image @ vp
    mixed = mixed + on_image[..., :front] @ vp[:, :, :front]
    if index == 0:
        lost = on_image[..., front:].sum(-1, keepdim=True)
        mixed = mixed + lost * vp[:, :, front : front + 1]
    return mass, mixed


def _strongest(mass, values, last_row, keep: int):
    """Return the `keep` visual tokens that contribute most to the last prompt row: (B, keep)."""
    batch, heads, visual, _ = values.shape
    row = last_row.view(batch, 1, 1, 1).expand(-1, heads, 1, mass.shape[-1])
    front = mass.shape[-1] - visual - mass.shape[2]
    weight = mass.gather(2, row)[:, :, 0, front : front + visual]
    return (weight[..., None] * values).square().sum((1, 3)).topk(keep, -1).indices
