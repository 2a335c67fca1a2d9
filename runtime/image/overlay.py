"""The image that the model sees, for people: its grid of tokens, heat maps over it.

Tokens are patches of the *prepared* image (padded, resized, cropped), so that is what a page
shows. It is made by the runtime's own preprocessing, only finer: with the sizes multiplied and the
normalising left out.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from ...graphs.config import ModelConfig
from ...graphs.errors import ImageError
from ...graphs.families.family import ImageLayout
from .image import preprocess
from .preprocessing import Preprocessing

SHOWN_SIDE = 672
"""Pixels that the shorter edge of a shown image should have, where the original has them."""

GHOST = 96
"""Pixels of the small grey copy behind the heat map of each layer."""

GAMMA = 0.6
"""Lifts weak contributions into sight."""

RAMP = np.array(  # R, G, B, alpha from no contribution to the strongest
    [
        [128, 20, 20, 0],
        [196, 40, 16, 130],
        [242, 106, 12, 205],
        [255, 196, 64, 235],
        [255, 250, 214, 250],
    ]
)

DIMMED = 0.25
"""Brightness that is left of what no kept token shows."""


Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in shares of its width and height; beyond
0 and 1 where an image is padded."""


@dataclass(frozen=True)
class Grid:
    """Places of tokens: ``columns`` x ``rows`` patches that cover ``extent`` of the image's side.

    ``first``: the patch of token 0; -1 where that is a class token, which has no place.
    ``boxes``: (N, 4) in shares of the whole picture, where tokens lie in layers, tiles over the
    picture as one; None: they are the patches in their order.
    """

    columns: int
    rows: int
    extent: float
    first: int
    boxes: np.ndarray | None = field(default=None, compare=False)

    @classmethod
    def of(cls, config: ModelConfig, layout: ImageLayout) -> Grid:
        """Return the grid of an image; what does not fill a patch at the border is cut."""
        if layout.boxes is not None:
            sizes = layout.boxes[:, 2:] - layout.boxes[:, :2]
            narrow, low = np.median(sizes[sizes.min(1) > 0], 0)  # most are not the whole picture's
            return cls(round(1 / narrow), round(1 / low), 1.0, 0, layout.boxes)
        vision = config.vision
        side = vision.image_size // vision.patch_size
        first = (config.select == "default") - (vision.kind == "clip")
        return cls(side, side, side * vision.patch_size / vision.image_size, first)

    def cells(self, values: np.ndarray) -> np.ndarray:
        """Arrange values (N, ...) of one image's tokens as (rows, columns, ...); 0 without one, and
        the largest where several lie.
        """
        tail = values.shape[1:]
        if self.boxes is not None:
            drawn = np.zeros((self.rows, self.columns, *tail), values.dtype)
            scale = np.array([self.columns, self.rows] * 2)
            for value, (left, top, right, bottom) in zip(
                values, (self.boxes * scale).round().astype(int), strict=False
            ):
                cell = drawn[top:bottom, left:right]
                np.maximum(cell, value, out=cell)
            return drawn
        out = np.zeros((self.rows * self.columns, *tail), values.dtype)
        lead = max(0, -self.first)
        start = max(0, self.first)
        count = min(len(values) - lead, len(out) - start)
        out[start : start + count] = values[lead : lead + count]
        return out.reshape(self.rows, self.columns, *tail)


def seen(image: Image.Image, preprocessing: Preprocessing, grid: Grid) -> Image.Image:
    """Return the image that the model sees, at several times its size where ``image`` allows.

    Args:
        image: RGB, from ``load_image``.
        preprocessing: of the checkpoint.
        grid: of the image.

    Raises:
        ImageError: as ``preprocess``.
    """
    if grid.boxes is not None:
        whole = image.copy()
        whole.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
        return whole
    plain = replace(preprocessing, rescale_factor=None, mean=None, std=None)
    factor = _factor(image, preprocessing)
    while factor > 1:
        try:
            return _to_image(preprocess(image, _scaled(plain, factor)))
        except ImageError:  # a very long image outgrows the limit on the way to its crop
            factor -= 1
    return _to_image(preprocess(image, plain))


def dimmed(image: Image.Image, cells: np.ndarray, extent: float) -> Image.Image:
    """Return an image that ``seen`` gave, dark outside of the true ``cells`` (rows, columns)."""
    mask = Image.new("L", image.size, round(255 * DIMMED))
    bright = Image.fromarray(np.where(cells, 255, round(255 * DIMMED)).astype(np.uint8))
    size = (round(image.width * extent), round(image.height * extent))
    mask.paste(bright.resize(size, Image.Resampling.NEAREST))
    return Image.composite(image, Image.new("RGB", image.size), mask)


def seen_box(size: tuple[int, int], preprocessing: Preprocessing, grid: Grid) -> Box:
    """Return where a grid lies in a (width, height) image."""
    if grid.boxes is not None:
        return 0.0, 0.0, 1.0, 1.0
    shown = [max(size)] * 2 if preprocessing.pad_color is not None else list(size)
    crop, resize = preprocessing.crop_size, preprocessing.size
    view = [float(edge) for edge in shown]
    if crop is not None:
        if isinstance(resize, int):
            resized = [edge * resize / min(shown) for edge in shown]
        else:
            resized = view if resize is None else [float(edge) for edge in resize[::-1]]
        view = [
            edge * kept / whole for edge, kept, whole in zip(view, crop[::-1], resized, strict=True)
        ]
    left, top = ((1 - own / edge) / 2 for own, edge in zip(view, size, strict=True))
    right, bottom = (
        start + grid.extent * own / edge
        for start, own, edge in zip((left, top), view, size, strict=True)
    )
    return left, top, right, bottom


def cropped_share(size: tuple[int, int], preprocessing: Preprocessing, grid: Grid) -> float:
    """Return the share of a (width, height) image that the model does not see, in 0..1.

    What the last patches leave of the prepared image does not count.
    """
    left, top, right, bottom = seen_box(size, preprocessing, replace(grid, extent=1.0))
    return 1 - min(1.0, right - left) * min(1.0, bottom - top)


def image_uri(image: Image.Image) -> str:
    """Return the image as a data URI: PNG or JPEG, whichever is smaller."""
    flat = _uri(image, "PNG")
    photo = _uri(image, "JPEG", quality=88)
    return min(flat, photo, key=len)


def ghost_uri(image: Image.Image) -> str:
    """Return a small grey copy as a data URI."""
    grey = image.convert("L")
    grey.thumbnail((GHOST, GHOST))
    return _uri(grey, "JPEG", quality=70)


def heat_uri(values: np.ndarray) -> str:
    """Draw values (rows, columns) in 0..1 as a transparent image, one pixel a token."""
    at = np.clip(values, 0, 1) ** GAMMA * (len(RAMP) - 1)
    low = np.minimum(at.astype(int), len(RAMP) - 2)
    part = (at - low)[..., None]
    pixels = (RAMP[low] * (1 - part) + RAMP[low + 1] * part).round().astype(np.uint8)
    return _uri(Image.fromarray(pixels, "RGBA"), "PNG")


def _factor(image: Image.Image, preprocessing: Preprocessing) -> int:
    """Return how much finer than the model's input to draw: not finer than the original."""
    size = preprocessing.size
    if size is None:
        return 1
    edge = size if isinstance(size, int) else min(size)
    original = max(image.size) if preprocessing.pad_color is not None else min(image.size)
    return max(1, round(min(SHOWN_SIDE, original) / edge))


def _scaled(preprocessing: Preprocessing, factor: int) -> Preprocessing:
    def scaled(edges):
        if isinstance(edges, tuple):
            return tuple(edge * factor for edge in edges)
        return None if edges is None else edges * factor

    size, crop = scaled(preprocessing.size), scaled(preprocessing.crop_size)
    return replace(preprocessing, size=size, crop_size=crop)


def _to_image(pixels: np.ndarray) -> Image.Image:
    """Return (3, H, W) values 0..255 as an image."""
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _uri(image: Image.Image, kind: str, **options) -> str:
    file = io.BytesIO()
    image.save(file, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
