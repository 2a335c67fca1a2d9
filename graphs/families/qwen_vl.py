"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a picture is a sequence of patches on a grid of its own shape,
and a square of them makes one row. Rows stand at a time, a height and a width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..config import Limits, ModelConfig
from ..config_fields import count, mapping, number, reject_value, side
from ..errors import ImageSizeError, ModelError
from ..fusion import Fusion
from ..text_config import TextConfig
from ..vision_config import VisionConfig
from .family import Family, ImageLayout, in_blocks

_MOST_RATIO = 200  # of the sides of an image, as the image processor has it
_OLD = Limits(3136, 12845056)
_PUBLISHED = {"qwen3_vl": Limits(65536, 16777216), "qwen2_5_vl": _OLD, "qwen2_vl": _OLD}
_SQUARE = 32  # patches of a side where nothing says how large a picture is


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of a Qwen-VL; older ones have the decoder's fields at the root.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    given = {k: v for k, v in data.items() if v is not None}
    family = given["model_type"]
    decoder = dict(mapping("text_config", given.get("text_config", given)))
    text = {**decoder, "model_type": f"{family}_text"}
    if given.get("tie_word_embeddings") is True:  # either place will do, as in transformers
        text["tie_word_embeddings"] = True
    encoder = mapping("vision_config", given.get("vision_config", {}))
    encoder = {k: v for k, v in encoder.items() if v is not None}
    config, width = TextConfig.from_hf(text), "out_hidden_size"
    if family == "qwen2_vl":
        width = "hidden_size"
    vision = _VISION[family](encoder)
    if encoder.get(width, 3584) != config.hidden:
        reject_value(
            f"vision_config.{width}",
            encoder.get(width, 3584),
            f"hidden_size={config.hidden} of the decoder",
        )
    layers = _added(encoder, vision, config) if family == "qwen3_vl" else ()
    return ModelConfig(
        # What is added behind a layer comes before the norm of the next.
        text=replace(config, inject=tuple(range(1, len(layers) + 1))),
        vision=vision,
        image_token_id=given.get("image_token_id", 151655),
        feature_layers=(-1,),
        select="full",
        fusion=Fusion(injected=tuple(layer + 1 for layer in layers)),
        family=family,
        limits=_PUBLISHED[family],
        block=vision.merge,
    )


def _added(given: Mapping[str, Any], vision: VisionConfig, text: TextConfig) -> tuple[int, ...]:
    """Return the layers of the encoder whose states are added within the decoder."""
    layers = given.get("deepstack_visual_indexes", (8, 16, 24))
    if not isinstance(layers, list | tuple):
        reject_value("vision_config.deepstack_visual_indexes", layers, "a list of layers")
    for layer in layers:
        count("vision_config.deepstack_visual_indexes", layer, vision.layers - 1, least=0)
    if len(layers) >= text.layers:
        reject_value(
            "vision_config.deepstack_visual_indexes",
            layers,
            f"fewer layers than the decoder's {text.layers}",
        )
    return tuple(layers)


def _vision3(given: Mapping[str, Any]) -> VisionConfig:
    positions = count(
        "vision_config.num_position_embeddings", given.get("num_position_embeddings", 2304)
    )
    if math.isqrt(positions) ** 2 != positions:
        reject_value("vision_config.num_position_embeddings", positions, "a square")
    shared = _shared(given, patch=16, depth=27)
    return VisionConfig(
        **shared,
        hidden=given.get("hidden_size", 1152),
        intermediate=given.get("intermediate_size", 4304),
        image_size=math.isqrt(positions) * shared["patch_size"],
        activation=given.get("hidden_act", "gelu_pytorch_tanh"),
    )


def _vision2(given: Mapping[str, Any]) -> VisionConfig:
    shared = _shared(given, patch=14, depth=32)
    hidden = count("vision_config.embed_dim", given.get("embed_dim", 1280))
    return VisionConfig(
        **shared,
        hidden=hidden,
        intermediate=int(hidden * number("vision_config.mlp_ratio", given.get("mlp_ratio", 4))),
        image_size=_SQUARE * shared["patch_size"],
        activation=given.get("hidden_act", "quick_gelu"),
        learned=False,
    )


def _vision25(given: Mapping[str, Any]) -> VisionConfig:
    shared = _shared(given, patch=14, depth=32)
    edge = shared["patch_size"] * shared["merge"]
    window = count("vision_config.window_size", given.get("window_size", 112), least=edge)
    if window % edge:
        reject_value("vision_config.window_size", window, f"a multiple of {edge}")
    return VisionConfig(
        **shared,
        hidden=given.get("hidden_size", 3584),
        intermediate=given.get("intermediate_size", 3420),
        image_size=_SQUARE * shared["patch_size"],
        activation=given.get("hidden_act", "silu"),
        rms=True,
        learned=False,
        gated=True,
        window=window // edge,
        whole=tuple(given.get("fullatt_block_indexes", (7, 15, 23, 31))),
    )


def _shared(given: Mapping[str, Any], patch: int, depth: int) -> dict[str, Any]:
    return {
        "kind": "patches",
        "layers": given.get("depth", depth),
        "heads": given.get("num_heads", 16),
        "patch_size": count(
            "vision_config.patch_size", side("patch_size", given.get("patch_size", patch))
        ),
        "channels": given.get("in_channels", given.get("in_chans", 3)),
        "eps": 1e-6,
        "merge": given.get("spatial_merge_size", 2),
        "frames": given.get("temporal_patch_size", 2),
    }


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
    """Return row and column of each patch, and what else the encoder reads of its place."""
    vision = config.vision
    turns = np.stack(
        [in_blocks(axis, vision.merge) for axis in np.indices(grid, dtype=np.int32)], 1
    )
    feeds = {"turns": turns}
    if vision.learned:
        feeds |= _nearest(turns, grid, vision.image_size // vision.patch_size)
    if vision.window:
        feeds |= _windows(grid, vision.merge, vision.window)
    return feeds


def _nearest(turns: np.ndarray, grid: tuple[int, int], table: int) -> dict[str, np.ndarray]:
    """Return the learned positions nearest to each patch, of a square table, and their weights."""
    places, weights = [], []
    for size, at in zip(grid, turns.T, strict=True):
        exact = at.astype(np.float32) * np.float32(table - 1) / np.float32(max(size - 1, 1))
        low = np.floor(exact)
        steps = np.arange(2, dtype=np.float32)
        places.append((low[:, None] + steps).clip(0, table - 1).astype(np.int32))
        weights.append((1 - np.abs((exact - low)[:, None] - steps)).clip(0))
    taps = places[0][:, :, None] * table + places[1][:, None]
    shares = weights[0][:, :, None] * weights[1][:, None]
    return {"taps": taps.reshape(-1, 4), "weights": shares.astype(np.float32).reshape(-1, 4)}


def _windows(grid: tuple[int, int], merge: int, window: int) -> dict[str, np.ndarray]:
    """Return the patch in each slot of each window, -1 where a window leaves the picture, and the
    slot of each patch among all.
    """
    rows, columns = (size // merge for size in grid)
    cells = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    padded = np.pad(cells, ((0, -rows % window), (0, -columns % window)), constant_values=-1)
    cut = in_blocks(padded, window)[:, None]
    patches = cut * merge**2 + np.arange(merge**2, dtype=np.int32)
    slots = np.where(cut < 0, -1, patches).reshape(-1)
    places = np.empty(rows * columns * merge**2, np.int32)
    places[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    return {"slots": slots.reshape(-1, (window * merge) ** 2), "places": places}


def most_rows(config: ModelConfig) -> int:
    """Return N of a picture of as many pixels as there may be."""
    return max(1, config.limits.most // _edge(config) ** 2)


def windows(config: ModelConfig) -> tuple[int, int, int]:
    """Return how many windows pictures have: the smallest, a square one of the most rows, the most.

    Long ones have more: their windows are cut. They are within ``_MOST_RATIO``, give or take what
    rounding the shorter side down to whole rows adds.
    """
    rows, window = most_rows(config), config.vision.window

    def of(high: int, wide: int) -> int:
        return math.ceil(high / window) * math.ceil(wide / window)

    lengths = range(1, math.isqrt(rows) + 1)
    most = max(of(high, min(rows // high, _MOST_RATIO * (high + 1))) for high in lengths)
    side = math.ceil(math.sqrt(rows))
    return 1, min(of(side, side), most), most


def _edge(config: ModelConfig) -> int:
    """Return the side in pixels of what a row stands for."""
    return config.vision.patch_size * config.vision.merge


_VISION = {"qwen3_vl": _vision3, "qwen2_5_vl": _vision25, "qwen2_vl": _vision2}


def _family(
    name: str,
    architecture: str,
    spellings: tuple[tuple[str, str], ...] = (),
    windows: Callable[[ModelConfig], tuple[int, int, int]] | None = None,
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        windows=windows,
        read=read,
        layout=layout,
        most_rows=most_rows,
        prefixes=(
            ("model.language_model.", "model."),
            ("model.visual.", "visual."),
        ),
        spellings=spellings,
        limits=limits,
        budgeted=budgeted,
    )


_MERGER = (
    (".merger.ln_q.", ".merger.norm."),
    (".merger.mlp.0.", ".merger.linear_fc1."),
    (".merger.mlp.2.", ".merger.linear_fc2."),
)
QWEN3_VL = _family("qwen3_vl", "Qwen3VLForConditionalGeneration")
QWEN2_5_VL = _family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _MERGER, windows)
QWEN2_VL = _family(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    (*_MERGER, (".mlp.fc1.", ".mlp.linear_fc1."), (".mlp.fc2.", ".mlp.linear_fc2.")),
)
