"""LLaVA-NeXT (1.6): a picture is brought to the best of some sizes with its shape kept, and cut; a
small copy of the whole comes first. Rows that padding made are left out, and each line of tokens
ends in a row of its own. Where a family has a limit, a picture of more tokens is shrunk behind the
encoder, bilinearly.
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

_SPARE = 1.1  # of a side: so much more is not shrunk
_SIZES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of a ``LlavaNextForConditionalGeneration``.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    config = llava.read(data)
    given = data.get("image_grid_pinpoints")
    limits = read_sizes(_SIZES if given is None else given, config.vision.image_size)
    if config.select != "default" or config.vision.kind != "clip":
        reject_value("vision_feature_select_strategy", config.select, "default, with CLIP")
    return replace(config, family="llava_next", limits=limits)


def read_sizes(sizes: Any, side: int) -> Limits:
    """Read ``image_grid_pinpoints``, for tiles of a side."""
    fits = isinstance(sizes, list | tuple) and len(sizes) > 0
    for size in sizes if fits else ():
        fits = fits and isinstance(size, list | tuple) and len(size) == 2
        fits = fits and all(type(edge) is int and edge > 0 and edge % side == 0 for edge in size)
    if not fits:
        reject_value("image_grid_pinpoints", sizes, f"heights and widths, multiples of {side}")
    return Limits(sizes=tuple((high, wide) for high, wide in sizes))


def budgeted(config: ModelConfig, tokens: int) -> Limits:
    """Return the limits under which no image takes more than ``tokens`` rows: fewer sizes."""
    sizes = tuple(size for size in config.limits.sizes if _most(config, size) <= tokens)
    if not sizes:
        least = min(_most(config, size) for size in config.limits.sizes)
        raise ModelError(
            f"--image-tokens is {tokens}, the smallest of image_grid_pinpoints takes up to "
            f"{least}. Give {least} or more"
        )
    return replace(config.limits, sizes=sizes)


def most_rows(config: ModelConfig) -> int:
    """Return N of a picture of the shape of the largest size."""
    return max(_most(config, size) for size in config.limits.sizes)


@lru_cache(maxsize=256)
def _most(config: ModelConfig, size: Size) -> int:
    """Return the most rows of a picture that is brought to a size: it may leave out of either."""
    edge = _edge(config)
    rows, columns = (length // config.vision.image_size * edge for length in size)
    kept = [(high, columns) for high in range(rows, 0, -2)]
    kept += [(rows, wide) for wide in range(columns, 0, -2)]
    shown = (shrunk(*cells, config.limits.most * edge**2) for cells in kept)
    return edge * edge + max(high * (wide + 1) for high, wide in shown)


def _edge(config: ModelConfig) -> int:
    return config.vision.image_size // config.vision.patch_size


@lru_cache(maxsize=64)
def layout(config: ModelConfig, height: int, width: int) -> ImageLayout:
    """Return the layout of a picture."""
    frame = best_size(height, width, config.limits.sizes)
    tile, edge = config.vision.image_size, _edge(config)
    grid = frame[0] // tile, frame[1] // tile
    shown = fitted(height, width, frame)
    lines, columns = kept_cells(height, width, (grid[0] * edge, grid[1] * edge))
    whole, line_ends = edge * edge, (1 + grid[0] * grid[1]) * edge * edge
    high, wide = shrunk(len(lines), len(columns), config.limits.most * whole)
    (down, down_shares), (across, across_shares) = _taps(lines, high), _taps(columns, wide)
    row, column = down[:, None, :, None], across[None, :, None, :]
    tiles = row // edge * grid[1] + column // edge
    places = (1 + tiles) * whole + row % edge * edge + column % edge
    behind = ((0, 0), (0, 1), (0, 0))  # each line's end
    ended = np.pad(places.reshape(high, wide, 4), behind, constant_values=line_ends)
    index = np.concatenate([np.arange(whole).repeat(4).reshape(-1, 4), ended.reshape(-1, 4)])
    feeds = {"pack": index.astype(np.int64)}
    if config.shrinks:
        own = down_shares[:, None, :, None] * across_shares[None, :, None, :]
        shares = np.zeros((high, wide + 1, 4), np.float32)
        shares[:, :wide], shares[:, wide, 0] = own.reshape(high, wide, 4), 1
        first = np.eye(1, 4, dtype=np.float32).repeat(whole, 0)
        feeds["weights"] = np.concatenate([first, shares.reshape(-1, 4)])
    else:
        feeds["pack"] = np.ascontiguousarray(feeds["pack"][:, 0])
    top, left = (
        _shares(config, cells, count, full, own)
        for cells, count, full, own in zip(
            (lines, columns), (high, wide), frame, shown, strict=True
        )
    )
    corners = np.meshgrid(top[:-1], left[:-1], indexing="ij")
    corners += np.meshgrid(top[1:], left[1:], indexing="ij")
    above, before, below, after = (np.pad(own, ((0, 0), (0, 1))) for own in corners)
    own_boxes = np.stack([before, above, after, below], -1).reshape(-1, 4)  # of ends: nothing
    return in_one_run(
        len(index),
        resizes=(shown,),
        padded=frame,
        grid=grid,
        whole="first",
        boxes=np.concatenate([tile_boxes((1, 1), edge, ""), own_boxes]),
        feeds=feeds,
    )


def _shares(
    config: ModelConfig, cells: np.ndarray, count: int, full: int, shown: int
) -> np.ndarray:
    """Return where each of ``count`` lines (or columns) of tokens begins and the last one ends, in
    shares of the ``shown`` pixels of a picture and not of those that fill the frame up.

    ``cells``: of the frame that they were shrunk from.
    """
    edge, vision = _edge(config), config.vision
    at = cells[:1].sum() + np.arange(count + 1) * (len(cells) / max(count, 1))
    pixels = at // edge * vision.image_size + at % edge * vision.patch_size
    return ((pixels - (full - shown) // 2) / shown).clip(0, 1)


def shrunk(high: int, wide: int, most: int) -> Size:
    """Return the lines and columns that so many become, where they are many more than ``most``;
    0: there is no limit.
    """
    ratio = math.sqrt(high * wide / most) if most else 0.0
    return (int(high // ratio), int(wide // ratio)) if ratio > _SPARE else (high, wide)


def _taps(cells: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two of some cells that each of ``count`` lies between, and their shares.

    As torch's bilinear interpolation has them, in FP32: corners are not aligned.
    """
    scale = np.float32(len(cells) / max(count, 1))
    exact = ((np.arange(count, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)).clip(
        0
    )
    low = exact.astype(np.int64)
    places = np.stack([low, (low + 1).clip(max=len(cells) - 1)], 1)
    part = exact - low
    return cells[places], np.stack([1 - part, part], 1)


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


def fitted(height: int, width: int, frame: Size) -> Size:
    """Return the size of a picture that fills a frame in one direction."""
    high, wide = frame[0] / height, frame[1] / width
    if wide < high:
        return min(math.ceil(height * wide), frame[0]), frame[1]
    return frame[0], min(math.ceil(width * high), frame[1])


def kept_cells(height: int, width: int, cells: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and the columns of a frame's cells that are not padding alone.

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
