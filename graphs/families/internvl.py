"""InternVL2.5, 3 and 3.5 in the form of transformers: a picture is cut into the grid of square
tiles that comes nearest to its shape, and a small copy of the whole follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..config import Limits, ModelConfig, TextConfig
from ..config_fields import count, flag, mapping, number, reject_value, side
from ..errors import ModelError
from ..vision_config import VisionConfig
from .family import Family, ImageLayout, in_one_run
from .llava import LLAVA
from .tiles import best_grid, tile_boxes

_MOST_TILES = 4096
_OPEN, _CLOSE = "<img>", "</img>"


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of an ``InternVLForConditionalGeneration``.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    given = {k: v for k, v in data.items() if v is not None}
    text = {"model_type": "qwen2", **mapping("text_config", given.get("text_config", {}))}
    text["tie_word_embeddings"] = given.get("tie_word_embeddings", True)  # as in transformers
    ratio = number("downsample_ratio", given.get("downsample_ratio", 0.5))
    if ratio > 1 or 1 / ratio != round(1 / ratio):
        reject_value("downsample_ratio", ratio, "1 divided by an integer")
    layers = given.get("vision_feature_layer", -1)
    return ModelConfig(
        text=TextConfig.from_hf(text),
        vision=_vision(mapping("vision_config", given.get("vision_config", {}))),
        image_token_id=given.get("image_token_id", 151667),
        feature_layers=tuple(layers) if isinstance(layers, list | tuple) else (layers,),
        select=given.get("vision_feature_select_strategy", "default"),
        projector_activation=given.get("projector_hidden_act", "gelu"),
        family="internvl",
        limits=Limits(least=1, most=12),
        block=round(1 / ratio),
        projector_norm=True,
    )


def _vision(data: Mapping[str, Any]) -> VisionConfig:
    given = {k: v for k, v in data.items() if v is not None}
    norm = given.get("norm_type", "layer_norm")
    if norm not in ("layer_norm", "rms_norm"):
        reject_value("vision_config.norm_type", norm, "layer_norm or rms_norm")
    for name, wanted in (
        ("use_mean_pooling", True),  # otherwise a norm follows the last layer
        ("use_absolute_position_embeddings", True),
        ("use_mask_token", False),
    ):
        if flag(f"vision_config.{name}", given.get(name, wanted)) != wanted:
            reject_value(f"vision_config.{name}", given[name], f"{wanted}, as published")
    return VisionConfig(
        kind="internvit",
        layers=given.get("num_hidden_layers", 24),
        hidden=given.get("hidden_size", 1024),
        intermediate=given.get("intermediate_size", 4096),
        heads=given.get("num_attention_heads", 16),
        image_size=side("image_size", given.get("image_size", 448)),
        patch_size=side("patch_size", given.get("patch_size", 14)),
        channels=given.get("num_channels", 3),
        eps=number("vision_config.layer_norm_eps", given.get("layer_norm_eps", 1e-6)),
        activation=given.get("hidden_act", "gelu"),
        biased=given.get("attention_bias", False),
        rms=norm == "rms_norm",
        qk_norm=given.get("use_qk_norm", False),
    )


def limits(config: ModelConfig, processor: Mapping[str, Any]) -> Limits:
    """Return the fewest and the most tiles, as the image processor's file has them."""
    least, most = (
        default if processor.get(name) is None else processor[name]
        for name, default in (("min_patches", 1), ("max_patches", 12))
    )
    count("max_patches", most, _MOST_TILES)
    return Limits(count("min_patches", least, most), most)


def budgeted(config: ModelConfig, tokens: int) -> Limits:
    """Return the limits under which no image takes more than ``tokens`` rows: fewer tiles."""
    one = _tile_rows(config)
    most = tokens // one
    most = most - 1 if most > 2 else min(most, 1)  # the whole picture is a tile, too
    if most < config.limits.least:
        raise ModelError(
            f"--image-tokens is {tokens}, an image takes {one} at least: one tile, and one more "
            f"from two tiles on. Give {_rows(config, config.limits.least)} or more"
        )
    return Limits(config.limits.least, min(most, config.limits.most))


def layout(config: ModelConfig, height: int, width: int) -> ImageLayout:
    """Return the layout of a picture."""
    tile, known = config.vision.image_size, config.limits
    grid = (1, 1) if known.most == 1 else best_grid(height, width, tile, known.least, known.most)
    return _of_grid(config, grid)


@lru_cache(maxsize=64)
def _of_grid(config: ModelConfig, grid: tuple[int, int]) -> ImageLayout:
    tiles = grid[0] * grid[1]
    whole = "last" if tiles > 1 else ""
    rows, tile = _rows(config, tiles), config.vision.image_size
    edge = tile // config.vision.patch_size // config.block
    return in_one_run(
        rows,
        runs=(_OPEN, rows, _CLOSE),
        resizes=((grid[0] * tile, grid[1] * tile),),
        grid=grid,
        whole=whole,
        boxes=tile_boxes(grid, edge, whole),
    )


def most_rows(config: ModelConfig) -> int:
    """Return N of a picture of as many tiles as there may be."""
    return _rows(config, config.limits.most)


def _rows(config: ModelConfig, tiles: int) -> int:
    return _tile_rows(config) * (tiles + (tiles > 1))


def _tile_rows(config: ModelConfig) -> int:
    return config.vision.patches // config.block**2


INTERNVL = Family(
    name="internvl",
    architecture="InternVLForConditionalGeneration",
    read=read,
    layout=layout,
    most_rows=most_rows,
    prefixes=LLAVA.prefixes,
    spellings=(
        (".encoder.layer.", ".encoder.layers."),
        (".attention.", ".self_attn."),
        (".projection_layer.", ".out_proj."),
        (".layernorm_before.", ".layer_norm1."),
        (".layernorm_after.", ".layer_norm2."),
        (".patch_embeddings.projection.", ".patch_embedding."),
        (".cls_token", ".class_embedding"),
        (".position_embeddings", ".position_embedding.weight"),
    ),
    limits=limits,
    budgeted=budgeted,
)
