"""Names and shapes of the tensors of a LLaVA checkpoint.

Three spellings are in circulation. They differ in prefixes only; ours, the canonical one, is what
the graphs' modules use (LlamaForCausalLM's names for the decoder):

    published llava-hf files      transformers >= 4.52, in memory      canonical
    language_model.model.         model.language_model.                model.
    language_model.lm_head.       lm_head.                             lm_head.
    vision_tower.[vision_model.]  model.vision_tower.[vision_model.]   vision_tower.
    multi_modal_projector.        model.multi_modal_projector.         multi_modal_projector.

Projectors of layer fusion as its authors release them, with ``model.`` before or without:

    mm_projector_f.{0,2}.     multi_modal_projector.linear_{1,2}.
    mm_projectors.K.{0,2}.    mm_projectors.K.linear_{1,2}.

A checkpoint with routers wraps its layers: ``model.layers.3.block.mlp...`` beside
``model.layers.3.router_mlp...``; ``block.`` is left out.

Where a tensor's bytes are is not known here.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from ...graphs.config import ModelConfig
from ...graphs.families.registry import FAMILIES
from ...graphs.modules.decoder import Body
from ...graphs.modules.encoders import make_vision
from ...graphs.modules.layer import Linear
from ...graphs.modules.ops import Eager
from ...graphs.modules.vision import Vision, VisionEncoder
from ...graphs.plan.routing import Routing, is_router
from ...graphs.text_config import TextConfig

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"

_ENCODER, _ENCODERS = "vision_tower.", ("vision_tower.", "visual.")
_FUSED = re.compile(r"(?:model\.)?(mm_projector_f|mm_projectors\.\d+)\.([02])\.")
_WRAPPED = re.compile(r"(model\.layers\.\d+\.)block\.")


def canonical(name: str, family: str = "llava") -> str:
    """Return the canonical name of a tensor that a checkpoint of a family calls ``name``."""
    name = _FUSED.sub(_fused, name)
    for prefix, ours in FAMILIES[family].prefixes:
        if name.startswith(prefix):
            name = ours + name[len(prefix) :]
            break
    name = _WRAPPED.sub(r"\1", name)
    if name.startswith(_ENCODERS):
        for theirs, ours in FAMILIES[family].spellings:
            name = name.replace(theirs, ours, 1)
    return name


def _fused(found: re.Match[str]) -> str:
    projector = found[1].replace("mm_projector_f", "multi_modal_projector")
    return f"{projector}.linear_{int(found[2]) // 2 + 1}."


def published_name(name: str, family: str = "llava") -> str:
    """Return a canonical name as published files spell it; the inverse of ``canonical``."""
    if name.startswith(_ENCODERS):
        for theirs, ours in FAMILIES[family].spellings:
            name = name.replace(ours, theirs, 1)
        if name.startswith(_ENCODER):
            return name
    for theirs, ours in FAMILIES[family].prefixes:  # the first of several is the published one
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def tensor_shapes(config: ModelConfig, *, whole_encoder: bool = False) -> Shapes:
    """Return the shape of every tensor the graphs read, by canonical name, in the model's order.

    Read off the graphs' modules. ``whole_encoder`` adds what published files hold and the graphs
    leave out: layers behind the deepest chosen hidden state, and the vision encoder's last norm.
    """
    with torch.device("meta"):
        vision = make_vision(config, Eager())
        if whole_encoder and isinstance(vision, Vision):
            encoder = VisionEncoder(config.vision, Eager(), config.vision.layers)
            if config.vision.kind != "internvit" and not config.vision.final_norm:
                encoder.post_layernorm = nn.LayerNorm(config.vision.hidden)
            vision.vision_tower = encoder
    return _shapes(vision) | decoder_shapes(config.text)


def decoder_shapes(text: TextConfig, routing: Routing | None = None) -> Shapes:
    """Return the shapes of the decoder alone: embedding, layers, last norm, head; with those of
    the routers where there is a ``routing``.
    """
    with torch.device("meta"):
        layers: dict[int, tuple] = {index: () for index in range(text.layers)}
        for index in layers:
            if routing is not None and routing.routes(index, text.layers):
                layers[index] = ("dense", "gated", (0, 0), routing)
        body = Body(text, Eager(), layers, last=True)
        head = Linear(Eager(), text.hidden, text.vocab, bias=False)
    decoder = nn.ModuleDict({"model": body, "lm_head": head})
    return {EMBEDDING: (text.vocab, text.hidden)} | _shapes(decoder)


def router_shapes(text: TextConfig, routing: Routing) -> Shapes:
    """Return the shapes of the routers alone."""
    return {name: s for name, s in decoder_shapes(text, routing).items() if is_router(name)}


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in module.named_parameters()}
