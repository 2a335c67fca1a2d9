"""What the model sees, for people: the prepared picture, its grid of tokens, heat maps over it.

Tokens are patches of the *prepared* picture (padded, resized, cropped), so that is what a page
shows. It is made by the runtime's own preprocessing, only finer: with the sizes multiplied and the
normalising left out.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...graphs.config import ModelConfig
from ...graphs.errors import ImageError
from ...runtime.image.image import preprocess
from ...runtime.image.preprocessing import Preprocessing

SHOWN_SIDE = 672
"""Pixels that the shorter edge of a shown picture should have, where the original has them."""

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


@dataclass(frozen=True)
class Grid:
    """Where tokens lie: ``columns`` x ``rows`` patches that cover ``extent`` of the picture's side.

    ``first``: the patch of token 0; -1 where that is a class token, which lies nowhere.
    """

    columns: int
    rows: int
    extent: float
    first: int

    @classmethod
    def of(cls, config: ModelConfig) -> Grid:
        """The grid of a model's tower; what does not fill a patch at the border is cut."""
        vision = config.vision
        side = vision.image_size // vision.patch_size
        first = (config.select == "default") - (vision.kind == "clip")
        return cls(side, side, side * vision.patch_size / vision.image_size, first)

    def cells(self, values: np.ndarray) -> np.ndarray:
        """Values (N, ...) of one picture's tokens as (rows, columns, ...); 0 where none lies."""
        tail = values.shape[1:]
        out = np.zeros((self.rows * self.columns, *tail), values.dtype)
        lead = max(0, -self.first)
        start = max(0, self.first)
        count = min(len(values) - lead, len(out) - start)
        out[start : start + count] = values[lead : lead + count]
        return out.reshape(self.rows, self.columns, *tail)


def seen(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The picture that reaches the tower, at several times its size where ``image`` allows.

    Args:
        image: RGB, from ``load_image``.
        preprocessing: of the checkpoint.

    Raises:
        ImageError: as ``preprocess``.
    """
    plain = replace(preprocessing, rescale_factor=None, mean=None, std=None)
    factor = _factor(image, preprocessing)
    while factor > 1:
        try:
            return _to_image(preprocess(image, _scaled(plain, factor)))
        except ImageError:  # a very long picture outgrows the limit on the way to its crop
            factor -= 1
    return _to_image(preprocess(image, plain))


def cropped_share(size: tuple[int, int], preprocessing: Preprocessing) -> float:
    """Share of a (width, height) picture that the model does not see, in 0..1."""
    crop, resize = preprocessing.crop_size, preprocessing.size
    if crop is None or preprocessing.pad_color is not None:
        return 0.0
    width, height = map(float, size)
    if isinstance(resize, int):
        width, height = (edge * resize / min(size) for edge in size)
    elif resize is not None:
        height, width = resize
    return 1 - min(1.0, crop[0] / height) * min(1.0, crop[1] / width)


def image_uri(image: Image.Image) -> str:
    """The picture as a data URI: PNG or JPEG, whichever is smaller."""
    flat, photo = io.BytesIO(), io.BytesIO()
    image.save(flat, "PNG", optimize=True)
    image.save(photo, "JPEG", quality=88, optimize=True)
    if flat.tell() <= photo.tell():
        return _uri("png", flat)
    return _uri("jpeg", photo)


def ghost_uri(image: Image.Image) -> str:
    """A small grey copy."""
    grey, file = image.convert("L"), io.BytesIO()
    grey.thumbnail((GHOST, GHOST))
    grey.save(file, "JPEG", quality=70, optimize=True)
    return _uri("jpeg", file)


def heat_uri(values: np.ndarray) -> str:
    """Values (rows, columns) in 0..1 as a transparent picture, one pixel a token."""
    at = np.clip(values, 0, 1) ** GAMMA * (len(RAMP) - 1)
    low = np.minimum(at.astype(int), len(RAMP) - 2)
    part = (at - low)[..., None]
    pixels = (RAMP[low] * (1 - part) + RAMP[low + 1] * part).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", optimize=True)
    return _uri("png", file)


def _factor(image: Image.Image, preprocessing: Preprocessing) -> int:
    """How much finer than the tower's input: up to ``SHOWN_SIDE``, and no finer than the
    original.
    """
    size = preprocessing.size
    if size is None:
        return 1
    edge = size if isinstance(size, int) else min(size)
    original = max(image.size) if preprocessing.pad_color is not None else min(image.size)
    return max(1, round(min(SHOWN_SIDE, original) / edge))


def _scaled(preprocessing: Preprocessing, factor: int) -> Preprocessing:
    size, crop = preprocessing.size, preprocessing.crop_size
    if isinstance(size, tuple):
        size = (size[0] * factor, size[1] * factor)
    elif size is not None:
        size *= factor
    if crop is not None:
        crop = (crop[0] * factor, crop[1] * factor)
    return replace(preprocessing, size=size, crop_size=crop)


def _to_image(pixels: np.ndarray) -> Image.Image:
    """(3, H, W) values 0..255 as a picture."""
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
