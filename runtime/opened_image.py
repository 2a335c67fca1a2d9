"""Images as a session holds them: decoded, or loaded from a file of what was computed of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from ..graphs.chain.executor import Encoded
from ..graphs.errors import ImageError
from ..graphs.families.family import ImageLayout
from ..graphs.fields import show
from .image.image import Preprocessing, prepare
from .image_cache import CachedPrefix

SUFFIX = ".safetensors"
"""Last part of the names of saved images; a session takes the path of such a file for an image."""

SAVE_AGAIN = "Save the image again: session.save_image('photo.jpg', 'photo.safetensors')"


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image; its key stands for what it shows."""

    key: str
    image: Image.Image
    preprocessing: Preprocessing
    layout: ImageLayout

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.image.height, self.image.width

    @cached_property
    def pixels(self) -> np.ndarray:
        """Float32, as the vision graph takes them; made when first needed."""
        return prepare(self.image, self.preprocessing, self.layout)

    def without_picture(self) -> OpenedImage:
        """Return the same for an engine alone: prepared, and the picture, which is larger, gone."""
        slim = replace(self, image=Image.new("RGB", (1, 1)))
        slim.__dict__["pixels"] = self.pixels
        return slim

    @property
    def known(self) -> None:
        """None: nothing was computed of it elsewhere."""
        return None


@dataclass(frozen=True)
class ImageOrigin:
    """Hashes of all that decides what an image becomes: the bundle's manifest, its plan and
    preprocessing, and the prompt's tokens before the image.
    """

    bundle: str
    plan: str
    preprocessing: str
    prompt: str

    def check(self, file: Path, here: ImageOrigin) -> None:
        """Refuse what ``file`` holds where an image becomes something else.

        Raises:
            ImageError: naming the first thing that differs.
        """
        for name in ("preprocessing", "plan", "prompt", "bundle"):  # a bundle has one of each
            found, wanted = getattr(self, name), getattr(here, name)
            if found != wanted:
                raise ImageError(
                    f"{file} was saved with another {name}: found {show(found[:12])}, here it is "
                    f"{show(wanted[:12])}. {SAVE_AGAIN}"
                )


@dataclass(frozen=True)
class LoadedImage:
    """An image as it was computed before, without its pixels.

    ``encoded`` entered stage 0; ``known`` is what the stages made of them behind the tokens
    that its key in the cache stands for. ``size``: height and width of the picture that it was.
    """

    key: str
    file: Path
    origin: ImageOrigin
    size: tuple[int, int]
    layout: ImageLayout
    encoded: Encoded
    known: tuple[str, CachedPrefix]

    @property
    def image(self) -> NoReturn:
        """Refuse: a file of this kind holds no picture.

        Raises:
            ImageError: always.
        """
        raise _no_picture(self.file)

    pixels = image


def check_picture(source: Source) -> None:
    """Refuse an image without pixels, where they are needed.

    Raises:
        ImageError: it is a ``LoadedImage``, or the path of such a file.
    """
    file = source.file if isinstance(source, LoadedImage) else source
    if isinstance(file, (str, os.PathLike)) and Path(file).suffix == SUFFIX:
        raise _no_picture(file)


def _no_picture(file: str | os.PathLike) -> ImageError:
    return ImageError(
        f"{os.fspath(file)} holds what the model computed of an image, not the image, which is "
        "needed here. Name the picture itself"
    )


Opened = OpenedImage | LoadedImage

Source = Any
"""A path (of a picture, or of a file of ``save_image``), bytes, file object, PIL image or uint8
array; or what a session's ``open`` or ``load_image`` returned.
"""
