"""SmolVLM, SmolVLM2 and Idefics3: a picture is stretched to a grid of square tiles, and a small
copy of the whole comes last. Each tile stands in a prompt behind the place that it has in the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..config import Limits, ModelConfig
from ..config_fields import count, mapping, number, reject_value, side
from ..errors import ModelError
from ..text_config import TextConfig
from ..vision_config import VisionConfig
from .family import Family, ImageLayout, Size
from .tiles import tile_boxes

_MOST_EDGE = 4096  # of transformers' class
_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


def reader(family: str) -> Callable[[Mapping[str, Any]], ModelConfig]:
    """Return the reader of a family's configs."""

    def read(data: Mapping[str, Any]) -> ModelConfig:
        """Read a ``config.json``; raises ModelError as others do."""
        given = {k: v for k, v in data.items() if v is not None}
        text = {"rms_norm_eps": 1e-5, **mapping("text_config", given.get("text_config", {}))}
        if given.get("tie_word_embeddings") is True:
            text["tie_word_embeddings"] = True
        encoder = _vision(mapping("vision_config", given.get("vision_config", {})))
        return ModelConfig(
            text=TextConfig.from_hf(text),
            vision=encoder,
            image_token_id=given.get("image_token_id", 128257),
            feature_layers=(-1,),
            select="full",
            projector_bias=False,
            family=family,
            limits=Limits(most=min(4 * encoder.image_size, _MOST_EDGE)),
            block=given.get("scale_factor", 2),
            projector_layers=1,
        )

    return read


def _vision(data: Mapping[str, Any]) -> VisionConfig:
    given = {k: v for k, v in data.items() if v is not None}
    return VisionConfig(
        kind="siglip",
        layers=given.get("num_hidden_layers", 12),
        hidden=given.get("hidden_size", 1152),
        intermediate=given.get("intermediate_size", 3072),
        heads=given.get("num_attention_heads", 16),
        image_size=side("image_size", given.get("image_size", 224)),
        patch_size=side("patch_size", given.get("patch_size", 32)),
        channels=given.get("num_channels", 3),
        eps=number("vision_config.layer_norm_eps", given.get("layer_norm_eps", 1e-6)),
        activation=given.get("hidden_act", "gelu_pytorch_tanh"),
        final_norm=True,
    )


def limits(config: ModelConfig, processor: Mapping[str, Any]) -> Limits:
    """Return the longest edge that a picture is brought to, as the image processor's file says."""
    tile = config.vision.image_size
    found = mapping("max_image_size", processor.get("max_image_size") or {"longest_edge": tile})
    if found.get("longest_edge") != tile:
        reject_value(
            "max_image_size", dict(found), f"longest_edge {tile}, the encoder's image_size"
        )
    if processor.get("do_image_splitting") is False:
        raise ModelError(
            "do_image_splitting is false: say so when building instead, "
            f"--image-tokens {_tile_rows(config)}"
        )
    size = mapping("size", processor.get("size") or {"longest_edge": config.limits.most})
    return Limits(most=count("size.longest_edge", size.get("longest_edge"), _MOST_EDGE, least=tile))


def budgeted(config: ModelConfig, tokens: int) -> Limits:
    """Return the limits under which no image takes more than ``tokens`` rows: a shorter edge."""
    one, tile = _tile_rows(config), config.vision.image_size
    if tokens < one:
        raise ModelError(f"--image-tokens is {tokens}, a tile takes {one}. Give {one} or more")
    edge = max(1, math.isqrt(max(0, tokens // one - 1)))
    return Limits(most=min(edge * tile, config.limits.most))


def most_rows(config: ModelConfig) -> int:
    """Return N of a square picture."""
    edge = math.ceil(config.limits.most / config.vision.image_size)
    return _tile_rows(config) * (edge * edge + (edge > 1))


def _tile_rows(config: ModelConfig) -> int:
    return config.vision.patches // config.block**2


def layout(config: ModelConfig, height: int, width: int) -> ImageLayout:
    """Return the layout of a picture."""
    tile = config.vision.image_size
    first = stretched(height, width, config.limits.most)
    return _of_sizes(config, first, tiled(*first, tile))


@lru_cache(maxsize=64)
def _of_sizes(config: ModelConfig, first: Size, second: Size) -> ImageLayout:
    tile, rows = config.vision.image_size, _tile_rows(config)
    grid = second[0] // tile, second[1] // tile
    whole = "last" if grid != (1, 1) else ""
    runs: list[str | int] = []
    before = ""
    for row in range(grid[0] if whole else 0):
        for column in range(grid[1]):
            runs += [f"{before}{_FAKE}<row_{row + 1}_col_{column + 1}>", rows]
            before = ""
        before = "\n"
    runs += [f"{before}\n{_FAKE}{_GLOBAL}" if whole else f"{_FAKE}{_GLOBAL}", rows, _FAKE]
    tiles = grid[0] * grid[1] + bool(whole)
    edge = tile // config.vision.patch_size // config.block
    return ImageLayout(
        rows=rows * tiles,
        runs=tuple(runs),
        positions=np.tile(np.arange(rows, dtype=np.int32), tiles)[:, None],
        advance=(rows,) * tiles,
        resizes=(first, second),
        grid=grid,
        whole="last" if whole else "",
        whole_of="resized",
        boxes=tile_boxes(grid, edge, whole),
    )


def stretched(height: int, width: int, most: int) -> Size:
    """Return the size of a picture whose longer edge becomes ``most``; the other is even."""
    ratio = width / height
    if width >= height:
        low = int(most / ratio)
        return max(low + low % 2, 1), most
    low = int(most * ratio)
    return most, max(low + low % 2, 1)


def tiled(height: int, width: int, tile: int) -> Size:
    """Return the size of multiples of a tile that a picture is stretched to."""

    def up(length: int) -> int:
        return math.ceil(length / tile) * tile

    ratio = width / height
    if width >= height:
        return up(int(up(width) / ratio)), up(width)
    return up(height), up(int(up(height) * ratio))


def _family(name: str, architecture: str) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        read=reader(name),
        layout=layout,
        most_rows=most_rows,
        prefixes=(
            ("model.text_model.", "model."),
            ("model.vision_model.", "vision_tower."),
            ("model.connector.modality_projection.proj.", "multi_modal_projector.linear_1."),
        ),
        spellings=(),
        nested=True,
        limits=limits,
        budgeted=budgeted,
    )


SMOLVLM = _family("smolvlm", "SmolVLMForConditionalGeneration")
IDEFICS3 = _family("idefics3", "Idefics3ForConditionalGeneration")
