"""Which linear layers a model has, and which of them read the same tensor. Pure data.

Layers that share an input share its range, and may be smoothed together: what makes the input
smaller per channel is folded into the module that made it, what undoes it into their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig

Place = Literal["vision", "decoder", "head"]

HEAD = "lm_head"


@dataclass(frozen=True)
class Group:
    """Linear layers of one input, by the checkpoint's names without ``.weight``.

    Attributes:
        linears: the layers, in the order in which they run.
        inputs: width K of what they read.
        fold: the module before them that can take a factor per channel: a norm (its weight and
            bias), or a projection (rows of its weight); None where nothing can.
        place: part of the model; ``vision`` holds tower and projector.
        layer: of the decoder, or of the tower; None for the projector and the head.
    """

    linears: tuple[str, ...]
    inputs: int
    fold: str | None
    place: Place
    layer: int | None = None

    @property
    def name(self) -> str:
        """Its first layer's."""
        return self.linears[0]


def linear_groups(config: ModelConfig) -> list[Group]:
    """Every group, in the order in which a prompt meets them."""
    return [*_encoder(config), *_projector(config), *_decoder(config)]


def _encoder(config: ModelConfig) -> list[Group]:
    states = config.vision.layers + 1
    width, wide = config.vision.hidden, config.vision.intermediate
    groups = []
    for layer in range(max(index % states for index in config.feature_layers)):
        at = f"vision_tower.encoder.layers.{layer}"
        attention = tuple(f"{at}.self_attn.{name}_proj" for name in "qkv")
        groups += [
            Group(attention, width, f"{at}.layer_norm1", "vision", layer),
            # The value projection could take o's factors, but has a bias and heads to mind.
            Group((f"{at}.self_attn.out_proj",), width, None, "vision", layer),
            Group((f"{at}.mlp.fc1",), width, f"{at}.layer_norm2", "vision", layer),
            Group((f"{at}.mlp.fc2",), wide, None, "vision", layer),
        ]
    return groups


def _projector(config: ModelConfig) -> list[Group]:
    features = config.vision.hidden * len(config.feature_layers)
    at = "multi_modal_projector.linear_"
    return [
        Group((f"{at}1",), features, None, "vision"),
        Group((f"{at}2",), config.text.hidden, None, "vision"),
    ]


def _decoder(config: ModelConfig) -> list[Group]:
    text = config.text
    groups = []
    for layer in range(text.layers):
        at = f"model.layers.{layer}"
        attention = tuple(f"{at}.self_attn.{name}_proj" for name in "qkv")
        mlp = (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        output, down = f"{at}.self_attn.o_proj", f"{at}.mlp.down_proj"
        groups += [
            Group(attention, text.hidden, f"{at}.input_layernorm", "decoder", layer),
            # Factors in the value projection would change |c_j|, by which selections choose.
            Group((output,), text.heads * text.head_dim, None, "decoder", layer),
            Group(mlp, text.hidden, f"{at}.post_attention_layernorm", "decoder", layer),
            # Its input is silu(gate) * up: linear in up, whose rows take the factors exactly.
            Group((down,), text.intermediate, f"{at}.mlp.up_proj", "decoder", layer),
        ]
    return [*groups, Group((HEAD,), text.hidden, "model.norm", "head")]
