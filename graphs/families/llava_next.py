"""LLaVA-NeXT (1.6): a picture is brought to the best of some sizes with its shape kept, and cut; a
small copy of the whole comes first. Rows that padding made are left out, and each line of tokens
ends in a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..config import Limits, ModelConfig
from ..config_fields import reject_value
from ..errors import ModelError
from . import llava
from .family import Family, ImageLayout, Size, in_one_run
from .tiles import tile_boxes

_SIZES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of a ``LlavaNextForConditionalGeneration``.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    config = llava.read(data)
    given = data.get("image_grid_pinpoints")
    sizes = _SIZES if given is None else given
    side = config.vision.image_size
    fits = isinstance(sizes, list | tuple) and len(sizes) > 0
    for size in sizes if fits else ():
        fits = fits and isinstance(size, list | tuple) and len(size) == 2
        fits = fits and all(type(edge) is int and edge > 0 and edge % side == 0 for edge in size)
    if not fits:
        reject_value("image_grid_pinpoints", given, f"heights and widths, multiples of {side}")
    if config.select != "default" or config.vision.kind != "clip":
        reject_value("vision_feature_select_strategy", config.select, "default, with CLIP")
    limits = Limits(sizes=tuple((high, wide) for high, wide in sizes))
    return replace(config, family="llava_next", limits=limits)


def budgeted(config: ModelConfig, tokens: int) -> Limits:
    """Return the limits under which no image takes more than ``tokens`` rows: fewer sizes."""
    sizes = tuple(size for size in config.limits.sizes if _most(config, size) <= tokens)
    if not sizes:
        least = min(_most(config, size) for size in config.limits.sizes)
        raise ModelError(
            f"--image-tokens is {tokens}, the smallest of image_grid_pinpoints takes up to "
            f"{least}. Give {least} or more"
        )
    return Limits(sizes=sizes)


def most_rows(config: ModelConfig) -> int:
    """Return N of a picture of the shape of the largest size."""
    return max(_most(config, size) for size in config.limits.sizes)


def _most(config: ModelConfig, size: Size) -> int:
    edge = _edge(config)
    rows, columns = (length // config.vision.image_size * edge for length in size)
    return edge * edge + rows * (columns + 1)


def _edge(config: ModelConfig) -> int:
    return config.vision.image_size // config.vision.patch_size


@lru_cache(maxsize=64)
def layout(config: ModelConfig, height: int, width: int) -> ImageLayout:
    """Return the layout of a picture."""
    canvas = best_size(height, width, config.limits.sizes)
    tile, edge = config.vision.image_size, _edge(config)
    grid = canvas[0] // tile, canvas[1] // tile
    shown = fitted(height, width, canvas)
    lines, columns = kept_cells(height, width, (grid[0] * edge, grid[1] * edge))
    whole, line_ends = edge * edge, (1 + grid[0] * grid[1]) * edge * edge
    row, column = np.meshgrid(lines, columns, indexing="ij")
    tiles = row // edge * grid[1] + column // edge
    places = (1 + tiles) * whole + row % edge * edge + column % edge
    ended = np.pad(places, ((0, 0), (0, 1)), constant_values=line_ends)
    index = np.concatenate([np.arange(whole), ended.reshape(-1)])
    # What a token shows, in shares of the picture and not of its padding; line ends show nothing.
    above, left = (full - own for full, own in zip(canvas, shown, strict=True))
    patch = config.vision.patch_size
    top, start = row * patch - above // 2, column * patch - left // 2
    corners = (start, top, start + patch, top + patch)
    scale = (shown[1], shown[0]) * 2
    boxes = [np.pad(own / most, ((0, 0), (0, 1))) for own, most in zip(corners, scale, strict=True)]
    own_boxes = np.stack(boxes, -1).reshape(-1, 4).clip(0, 1)
    return in_one_run(
        len(index),
        resizes=(shown,),
        canvas=canvas,
        grid=grid,
        whole="first",
        boxes=np.concatenate([tile_boxes((1, 1), edge, ""), own_boxes]),
        feeds={"pack": index.astype(np.int64)},
    )


def best_size(height: int, width: int, sizes: tuple[Size, ...]) -> Size:
    """Return the size in which most of a picture's pixels are kept, and of those the smallest."""
    best, most, least = sizes[0], 0, float("inf")
    for high, wide in sizes:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = high * wide - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (high, wide), kept, wasted
    return best


def fitted(height: int, width: int, canvas: Size) -> Size:
    """Return the size of a picture that fills a canvas in one direction."""
    high, wide = canvas[0] / height, canvas[1] / width
    if wide < high:
        return min(math.ceil(height * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * high), canvas[1])


def kept_cells(height: int, width: int, cells: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and the columns of a canvas's cells that are not padding alone.

    As transformers rounds, which is not quite how it pads.
    """
    high, wide = cells
    if width / height > wide / high:
        gap = (high - int(round(height * (wide / width), 7))) // 2
        return np.arange(gap, high - gap), np.arange(wide)
    gap = (wide - int(round(width * (high / height), 7))) // 2
    return np.arange(high), np.arange(gap, wide - gap)


LLAVA_NEXT = Family(
    name="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    read=read,
    layout=layout,
    most_rows=most_rows,
    prefixes=(
        ("image_newline", "pack.newline"),
        ("model.image_newline", "pack.newline"),
        *llava.LLAVA.prefixes,
    ),
    budgeted=budgeted,
)
