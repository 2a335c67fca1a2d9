"""LLaVA-1.5: every image is one square, of as many rows as its encoder has patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from ..config_fields import mapping, reject_value
from ..fields import show
from ..fusion import read_fusion
from ..text_config import TextConfig
from ..vision_config import DEFAULT_ENCODER, VisionConfig
from .family import Family, ImageLayout, in_one_run

_DEFAULT_SEQUENCE = 576


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of a ``LlavaForConditionalGeneration``.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    given = {k: v for k, v in data.items() if v is not None}
    text = dict(mapping("text_config", given.get("text_config", {})))
    if given.get("tie_word_embeddings") is True:  # either place will do, as in transformers
        text["tie_word_embeddings"] = True
    encoder = given.get("vision_config", DEFAULT_ENCODER)
    layers = given.get("vision_feature_layer", -2)
    decoder, vision = TextConfig.from_hf(text), VisionConfig.from_hf(encoder)
    fused = read_fusion(given, vision.layers, decoder.layers)
    base = tuple(layers) if isinstance(layers, list | tuple) else (layers,)
    config = ModelConfig(
        text=replace(decoder, inject=fused.layers),
        vision=vision,
        image_token_id=image_token(given, 32000),
        feature_layers=(*fused.features, *base),
        select=given.get("vision_feature_select_strategy", "default"),
        projector_activation=given.get("projector_hidden_act", "gelu"),
        projector_bias=given.get("multimodal_projector_bias", True),
        fusion=fused.fusion,
    )
    stated = given.get("image_seq_length", _DEFAULT_SEQUENCE)
    # The class default is in many files whose model has another count, and transformers
    # reads the field nowhere; any other number was written on purpose.
    if stated not in (_DEFAULT_SEQUENCE, config.visual_tokens):
        reject_value(
            "image_seq_length",
            stated,
            f"{config.visual_tokens}, which image_size, patch_size and "
            "vision_feature_select_strategy amount to",
        )
    return config


def image_token(given: Mapping[str, Any], default: int) -> Any:
    """Return the id of the image token, under either of its names."""
    index, token = given.get("image_token_index"), given.get("image_token_id")
    if None not in (index, token) and index != token:
        reject_value(
            "image_token_id", token, f"image_token_index={show(index)}, or only one of them"
        )
    chosen = token if index is None else index
    return default if chosen is None else chosen


def layout(config: ModelConfig, height: int, width: int) -> ImageLayout:
    """Return the layout of any image: the processor makes a square of it."""
    return in_one_run(most_rows(config))


def most_rows(config: ModelConfig) -> int:
    """Return N. ``default`` drops the first row of *any* encoder, as transformers does.

    In CLIP that row is the class token; in SigLIP it is the image's first patch.
    """
    return config.vision.tokens - (config.select == "default")


LLAVA = Family(
    name="llava",
    architecture="LlavaForConditionalGeneration",
    read=read,
    layout=layout,
    most_rows=most_rows,
    plan="visipruner",
    prefixes=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "vision_tower."),
        ("multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)
