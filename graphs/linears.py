"""Linear layers of a model, in groups that read the same tensor. Pure data.

Layers that share an input share its range, and may be smoothed together: what makes the input
smaller per channel is folded into the module that made it, what undoes it into their weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .config import ModelConfig
from .vision_config import PATCHES

Place = Literal["vision", "decoder", "head"]

HEAD = "lm_head"

ATTENTION_OUTPUT, MLP_OUTPUT = "self_attn.o_proj", "mlp.down_proj"
"""Names, in a layer of the decoder, of the projections that write to the residual stream."""

_DECODER_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Group:
    """Linear layers of one input, by the checkpoint's names without ``.weight``.

    Attributes:
        linears: the layers, in the order in which they run.
        inputs: width K of what they read.
        outputs: width N of what each of them returns.
        fold: the module before them that can take a factor per channel: a norm (its weight and
            bias), or a projection (rows of its weight); None where nothing can.
        place: part of the model; ``vision`` holds encoder and projector.
        layer: of the decoder, or of the encoder; None for the projector and the head.
    """

    linears: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]
    fold: str | None
    place: Place
    layer: int | None = None

    @property
    def name(self) -> str:
        """Its first layer's."""
        return self.linears[0]


def decoder_module(layer: int, name: str) -> str:
    """Return the checkpoint's name of a module of a decoder layer, such as ``ATTENTION_OUTPUT``."""
    return f"model.layers.{layer}.{name}"


def in_decoder_layer(module: str) -> tuple[int, str] | None:
    """Return layer and name of ``decoder_module``; None of a module that is elsewhere."""
    found = _DECODER_LAYER.fullmatch(module)
    return found and (int(found[1]), found[2])


def linear_groups(config: ModelConfig, dropped: Collection[tuple[str, int]] = ()) -> list[Group]:
    """Return every group, in the order in which a prompt meets them.

    ``dropped``: halves of decoder layers that are left out, as ``StagePlan.dropped`` has them.
    """
    patches = config.vision.kind == PATCHES
    vision = _patches(config) if patches else [*_encoder(config), *_projector(config)]
    return [*vision, *_decoder(config, dropped)]


def _patches(config: ModelConfig) -> list[Group]:
    """Return the groups of an encoder of patches, its mergers among them."""
    width, wide = config.vision.hidden, config.vision.intermediate
    gated = config.vision.gated
    first = ("gate_proj", "up_proj") if gated else ("linear_fc1",)
    last = "down_proj" if gated else "linear_fc2"
    groups = []
    for layer in range(config.vision.layers):
        at = f"visual.blocks.{layer}"
        groups += [
            Group((f"{at}.attn.qkv",), width, (3 * width,), f"{at}.norm1", "vision", layer),
            Group((f"{at}.attn.proj",), width, (width,), None, "vision", layer),
            Group(
                tuple(f"{at}.mlp.{own}" for own in first),
                width,
                (wide,) * len(first),
                f"{at}.norm2",
                "vision",
                layer,
            ),
            Group((f"{at}.mlp.{last}",), wide, (width,), None, "vision", layer),
        ]
    square, rows = width * config.block**2, config.text.hidden
    lists = [f"visual.deepstack_merger_list.{at}" for at in range(len(config.text.inject))]
    for name in ("visual.merger", *lists):
        groups += [
            Group((f"{name}.linear_fc1",), square, (square,), None, "vision"),
            Group((f"{name}.linear_fc2",), square, (rows,), None, "vision"),
        ]
    return groups


def _encoder(config: ModelConfig) -> list[Group]:
    width, wide = config.vision.hidden, config.vision.intermediate
    groups = []
    for layer in range(config.encoder_depth):
        at = f"vision_tower.encoder.layers.{layer}"
        attention = tuple(f"{at}.self_attn.{name}_proj" for name in "qkv")
        groups += [
            Group(attention, width, (width,) * 3, f"{at}.layer_norm1", "vision", layer),
            # The value projection could take o's factors, but has a bias and heads to mind.
            Group((f"{at}.self_attn.out_proj",), width, (width,), None, "vision", layer),
            Group((f"{at}.mlp.fc1",), width, (wide,), f"{at}.layer_norm2", "vision", layer),
            Group((f"{at}.mlp.fc2",), wide, (width,), None, "vision", layer),
        ]
    return groups


def _projector(config: ModelConfig) -> list[Group]:
    features = config.feature_width
    width, own = config.text.hidden, config.vision.hidden
    read = {"multi_modal_projector": features}
    read |= {f"mm_projectors.{number}": own for number in range(len(config.text.inject))}
    return [
        Group((f"{name}.linear_{place}",), inputs, (width,), None, "vision")
        for name, first in read.items()
        for place, inputs in ((1, first), (2, width))[: config.projector_layers]
    ]


def _decoder(config: ModelConfig, dropped: Collection[tuple[str, int]]) -> list[Group]:
    text = config.text
    width, wide = text.hidden, text.intermediate
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    groups = []
    for layer in range(text.layers):
        at = partial(decoder_module, layer)
        attention = tuple(at(f"self_attn.{name}_proj") for name in "qkv")
        mlp = (at("mlp.gate_proj"), at("mlp.up_proj"))
        if ("attention", layer) not in dropped:
            outputs, norm = (queries, keys, keys), at("input_layernorm")
            groups += [
                Group(attention, width, outputs, norm, "decoder", layer),
                # Factors in the value projection would change |c_j|, by which selections choose.
                Group((at(ATTENTION_OUTPUT),), queries, (width,), None, "decoder", layer),
            ]
        if ("mlp", layer) not in dropped:
            norm = at("post_attention_layernorm")
            groups += [
                Group(mlp, width, (wide, wide), norm, "decoder", layer),
                # Its input is silu(gate) * up: linear in up, whose rows take the factors exactly.
                Group((at(MLP_OUTPUT),), wide, (width,), at("mlp.up_proj"), "decoder", layer),
            ]
    return [*groups, Group((HEAD,), width, (text.vocab,), "model.norm", "head")]
