"""Qwen3-VL: a picture is a sequence of patches on a grid of its own shape, and a square of them
makes one row. Rows stand at a time, a height and a width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..config import Limits, ModelConfig
from ..config_fields import count, mapping, reject_value, side
from ..errors import ImageSizeError, ModelError
from ..fusion import Fusion
from ..text_config import TextConfig
from ..vision_config import VisionConfig
from .family import Family, ImageLayout, in_blocks

_MOST_RATIO = 200  # of the sides of an image, as the image processor has it
_PUBLISHED = Limits(65536, 16777216)


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of a ``Qwen3VLForConditionalGeneration``.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    given = {k: v for k, v in data.items() if v is not None}
    text = {"model_type": "qwen3_vl_text", **mapping("text_config", given.get("text_config", {}))}
    if given.get("tie_word_embeddings") is True:  # either place will do, as in transformers
        text["tie_word_embeddings"] = True
    encoder = mapping("vision_config", given.get("vision_config", {}))
    decoder, vision = TextConfig.from_hf(text), _vision(encoder)
    if encoder.get("out_hidden_size", 3584) != decoder.hidden:
        reject_value(
            "vision_config.out_hidden_size",
            encoder.get("out_hidden_size", 3584),
            f"hidden_size={decoder.hidden} of the decoder",
        )
    layers = encoder.get("deepstack_visual_indexes", (8, 16, 24))
    if not isinstance(layers, list | tuple):
        reject_value("vision_config.deepstack_visual_indexes", layers, "a list of layers")
    for layer in layers:
        count("vision_config.deepstack_visual_indexes", layer, vision.layers - 1, least=0)
    if len(layers) >= decoder.layers:
        reject_value(
            "vision_config.deepstack_visual_indexes",
            layers,
            f"fewer layers than the decoder's {decoder.layers}",
        )
    return ModelConfig(
        # What is added behind a layer comes before the norm of the next.
        text=replace(decoder, inject=tuple(range(1, len(layers) + 1))),
        vision=vision,
        image_token_id=given.get("image_token_id", 151655),
        feature_layers=(-1,),
        select="full",
        fusion=Fusion(injected=tuple(layer + 1 for layer in layers)),
        family="qwen3_vl",
        limits=_PUBLISHED,
        block=vision.merge,
    )


def _vision(given: Mapping[str, Any]) -> VisionConfig:
    positions = count(
        "vision_config.num_position_embeddings", given.get("num_position_embeddings", 2304)
    )
    if math.isqrt(positions) ** 2 != positions:
        reject_value("vision_config.num_position_embeddings", positions, "a square")
    patch = side("patch_size", given.get("patch_size", 16))
    return VisionConfig(
        kind="patches",
        layers=given.get("depth", 27),
        hidden=given.get("hidden_size", 1152),
        intermediate=given.get("intermediate_size", 4304),
        heads=given.get("num_heads", 16),
        image_size=math.isqrt(positions) * count("vision_config.patch_size", patch),
        patch_size=patch,
        channels=given.get("in_channels", 3),
        eps=1e-6,
        activation=given.get("hidden_act", "gelu_pytorch_tanh"),
        merge=given.get("spatial_merge_size", 2),
        frames=given.get("temporal_patch_size", 2),
    )


def limits(config: ModelConfig, processor: Mapping[str, Any]) -> Limits:
    """Return the fewest and the most pixels, as the image processor's file has them."""
    size = processor.get("size")
    size = size if isinstance(size, Mapping) else {}
    least, most = (
        next((value for value in values if value is not None), default)
        for values, default in (
            ((processor.get("min_pixels"), size.get("shortest_edge")), config.limits.least),
            ((processor.get("max_pixels"), size.get("longest_edge")), config.limits.most),
        )
    )
    for name, expected in (
        ("patch_size", config.vision.patch_size),
        ("merge_size", config.vision.merge),
        ("temporal_patch_size", config.vision.frames),
    ):
        if processor.get(name, expected) != expected:
            reject_value(f"the image processor's {name}", processor[name], str(expected))
    return Limits(least, most)


def budgeted(config: ModelConfig, tokens: int) -> Limits:
    """Return the limits under which no image takes more than ``tokens`` rows: fewer pixels."""
    if tokens < 4:
        raise ModelError(f"--image-tokens is {tokens}, expected 4 or more: --image-tokens 256")
    most = min(tokens * _edge(config) ** 2, config.limits.most)
    return Limits(min(config.limits.least, most // 4), most)


def layout(config: ModelConfig, height: int, width: int) -> ImageLayout:
    """Return the layout of a picture.

    Raises:
        ImageSizeError: it is too long for its other side.
    """
    if max(height, width) > _MOST_RATIO * min(height, width):
        raise ImageSizeError(
            f"the image is {width} x {height}, its longer side may be {_MOST_RATIO} times the "
            "other. Cut it into pieces"
        )
    edge = _edge(config)
    high, wide = resized(height, width, edge, config.limits.least, config.limits.most)
    if high // edge * (wide // edge) > most_rows(config):
        raise ImageSizeError(
            f"the image is {width} x {height}, and so long for its other side that it takes more "
            f"than {most_rows(config)} tokens. Cut it into pieces"
        )
    return _of_size(config, high, wide)


def resized(height: int, width: int, edge: int, least: int, most: int) -> tuple[int, int]:
    """Return multiples of ``edge`` near height and width, of ``least`` to ``most`` pixels together.

    As the image processor rounds: halves go to even.
    """
    high, wide = (round(size / edge) * edge for size in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (
            max(edge, math.floor(size / shrink / edge) * edge) for size in (height, width)
        )
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(size * grow / edge) * edge for size in (height, width))
    return high, wide


@lru_cache(maxsize=64)
def _of_size(config: ModelConfig, high: int, wide: int) -> ImageLayout:
    vision, edge = config.vision, _edge(config)
    rows, columns = high // edge, wide // edge
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    corners = np.stack([column, row, column + 1, row + 1], 1) / [columns, rows, columns, rows]
    grid = high // vision.patch_size, wide // vision.patch_size
    return ImageLayout(
        rows=rows * columns,
        runs=(rows * columns,),
        positions=np.stack([np.zeros_like(row), row, column], 1),
        advance=(max(rows, columns),),
        resizes=((high, wide),),
        grid=grid,
        merge=vision.merge,
        boxes=corners,
        feeds=_feeds(config, grid),
    )


def _feeds(config: ModelConfig, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return row and column of each patch, and the learned positions nearest to it with weights."""
    vision = config.vision
    turns = np.stack(
        [in_blocks(axis, vision.merge) for axis in np.indices(grid, dtype=np.int32)], 1
    )
    places, weights = [], []
    table = vision.image_size // vision.patch_size
    for size, at in zip(grid, turns.T, strict=True):
        exact = at.astype(np.float32) * np.float32(table - 1) / np.float32(max(size - 1, 1))
        low = np.floor(exact)
        steps = np.arange(2, dtype=np.float32)
        places.append((low[:, None] + steps).clip(0, table - 1).astype(np.int32))
        weights.append((1 - np.abs((exact - low)[:, None] - steps)).clip(0))
    taps = places[0][:, :, None] * table + places[1][:, None]
    shares = weights[0][:, :, None] * weights[1][:, None]
    return {
        "turns": turns,
        "taps": taps.reshape(-1, 4),
        "weights": shares.astype(np.float32).reshape(-1, 4),
    }


def most_rows(config: ModelConfig) -> int:
    """Return N of a picture of as many pixels as there may be."""
    return max(1, config.limits.most // _edge(config) ** 2)


def _edge(config: ModelConfig) -> int:
    """Return the side in pixels of what a row stands for."""
    return config.vision.patch_size * config.vision.merge


QWEN3_VL = Family(
    name="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    read=read,
    layout=layout,
    most_rows=most_rows,
    prefixes=(
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
    ),
    limits=limits,
    budgeted=budgeted,
)
