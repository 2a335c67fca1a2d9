"""An image from any source to RGB to pixel values, like those of Hugging Face's PIL processors.

    source ──load_image──▶ RGB image ──preprocess──▶ (3, H, W) float32
                               │
                               └──pixel_key──▶ its key in caches

Sizes are checked from the header, before anything is decoded. ``load_image`` says how each kind of
image is converted. This module knows neither models nor prompts.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...graphs.errors import ImageError
from .preprocessing import Preprocessing

__all__ = ["FORMATS", "MAX_PIXELS", "Preprocessing", "load_image", "pixel_key", "preprocess"]

MAX_PIXELS = 64_000_000
# Only formats that Pillow decodes by itself: EPS, for one, would start an external program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image, upright and in RGB, with nothing else attached to it.

    EXIF orientation is applied first (unreadable EXIF counts as none). Then, as Hugging Face's
    processors do (transformers 5.23): palettes are looked up; transparency (alpha, or a transparent
    palette entry or colour) is composited over white; CMYK, YCbCr, LAB, grey and 1-bit images go
    through Pillow's ``convert("RGB")``. 16-bit grey is scaled to 8 bits, where Pillow would turn
    everything above 255 white; 32-bit integers count as 16-bit values. Of an animation or a
    document the first frame is taken (of a PIL image, the current one).

    Args:
        source: a path; the bytes of a file; a binary file object (read from its beginning); a PIL
            image; or an array (H, W), (H, W, 3) or (H, W, 4) of uint8.
        max_pixels: largest width x height that is decoded.

    Raises:
        ImageError: missing, unsupported, damaged or too large.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, max_pixels, "the image")
        return _decode(source, "the image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(io.BytesIO(source), "the bytes given", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _read_path(source, max_pixels)
    if hasattr(source, "read"):
        return _read_file(_seekable(source, max_pixels), "the file object", max_pixels)
    raise ImageError(
        f"an image cannot be made from {type(source).__name__}; expected a path, bytes, a binary "
        "file object, a PIL image or a uint8 array (H, W[, 3 or 4])."
    )


def preprocess(
    image: Image.Image, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return pixel values (3, H, W) float32 of an RGB image from ``load_image``.

    Args:
        image: RGB.
        preprocessing: of the checkpoint.
        max_pixels: of the largest image made on the way; a very long one grows before the crop.

    Raises:
        ImageError: a step would make an image larger than ``max_pixels``.
    """
    if image.mode != "RGB":
        raise TypeError(
            f"preprocess() takes the RGB image that load_image() returns, not mode {image.mode}"
        )
    if preprocessing.pad_color is not None:
        image = _pad_to_square(image, preprocessing.pad_color, max_pixels)
    if preprocessing.size is not None:
        height, width = _resized(image.size, preprocessing.size)
        _check_size((width, height), max_pixels, _grown(image.size, "the resize"))
        image = image.resize((width, height), Image.Resampling(preprocessing.resample))
    pixels = np.asarray(image).transpose(2, 0, 1)
    if preprocessing.crop_size is not None:
        pixels = _center_crop(pixels, preprocessing.crop_size)
    out = np.empty(pixels.shape, np.float32)
    for table, plane, channel in zip(_values(preprocessing), pixels, out, strict=True):
        np.take(table, plane, out=channel, mode="clip")  # nothing to clip: it skips a copy
    return out


def _values(preprocessing: Preprocessing) -> np.ndarray:
    """Return the value of each of 256 brightnesses in each channel: (3, 256) float32.

    Looked up rather than computed for every pixel: the same numbers in a fraction of the time.
    """
    values: np.ndarray = np.tile(np.arange(256), (3, 1))
    if preprocessing.rescale_factor is not None:
        values = values.astype(np.float64) * preprocessing.rescale_factor
    values = values.astype(np.float32)
    if preprocessing.mean is not None:
        mean = np.array(preprocessing.mean, np.float32)[:, None]
        std = np.array(preprocessing.std, np.float32)[:, None]
        values = (values - mean) / std
    return values


def pixel_key(image: Image.Image, preprocessing: Preprocessing) -> str:
    """Return the SHA-256 (hex) of an RGB image's size and pixels and of their preprocessing.

    Two files with the same decoded pixels have one key.
    """
    recipe = json.dumps(preprocessing.to_dict(), sort_keys=True)
    digest = hashlib.sha256(f"{image.mode} {image.size} {recipe}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


# --- reading -------------------------------------------------------------------------------


def _from_array(array: np.ndarray) -> Image.Image:
    grey_or_colour = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not grey_or_colour or 0 in array.shape:
        hint = ""
        if array.dtype.kind == "f":
            hint = " For values in 0..1: (array * 255).round().astype('uint8')."
        elif array.ndim == 3 and array.shape[0] in (3, 4):
            hint = " For channels first: array.transpose(1, 2, 0)."
        raise ImageError(
            f"the array has shape {array.shape} and type {array.dtype}; expected uint8 of shape "
            f"(H, W), (H, W, 3) or (H, W, 4), not empty.{hint}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _read_path(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    if str(path).lower().startswith(("http://", "https://", "data:")):
        raise ImageError(
            f"{str(path)[:80]} is an address, not a file. Download it first and give its path."
        )
    try:
        with Path(path).open("rb") as file:
            return _read_file(file, str(path), max_pixels)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"the image {path} cannot be opened: {reason}. Check the path.") from error


def _seekable(file: Any, max_pixels: int) -> Any:
    """Return the file object itself, or its content when it is a pipe (never more than needed)."""
    if hasattr(file, "seekable") and file.seekable():
        return file
    most = 8 * max_pixels + 2**20  # no supported format needs more, header included
    data = file.read(most + 1)
    if not isinstance(data, bytes):
        raise ImageError("the file object yields text; open the image in binary mode ('rb').")
    if len(data) > most:
        raise ImageError(
            f"the file object holds more than {most} bytes; that is no image of "
            f"{max_pixels} pixels or less. Pass a larger max_pixels."
        )
    return io.BytesIO(data)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # registers every decoder that this Pillow was built with
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read_file(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's own limit, which it checks before telling the size.
        allowed = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
        _check_size(_declared_size(file), allowed, name)
        raise
    except Exception as error:  # a decoder may raise anything at all over a damaged header
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ImageError(
            f"{name} is not an image that can be read{why}. Supported: {', '.join(_formats())}. "
            "Convert it to PNG or JPEG."
        ) from error
    with image:
        _check_size(image.size, max_pixels, name)
        return _decode(image, name)


def _declared_size(file: Any) -> tuple[int, int]:
    """Return width and height from the header alone, past Pillow's check of their product."""
    file.seek(0)
    head = file.read(16)
    for name in _formats():
        factory, accept = Image.OPEN[name]
        known = accept(head) if accept else False
        if known and not isinstance(known, str):  # text: known, but this Pillow cannot decode it
            file.seek(0)
            return factory(file, "").size
    raise AssertionError("Pillow knew the format a moment ago")


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF: the pixels are sound all the same
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # a decoder may raise anything at all over damaged data
        raise ImageError(
            f"{name} cannot be decoded ({error}); it is damaged or cut short. Fetch it again, or "
            "save it anew with an image editor."
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError(
            "the image holds floating point values, whose range is not known. Scale it to 0..255 "
            "and save it with 8 bits per channel."
        )
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.info = {}
    return image


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"the image holds integers from {values.min()} to {values.max()}; expected 0..65535. "
            "Save it with 8 or 16 bits per channel."
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


# --- steps ---------------------------------------------------------------------------------


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height} pixels; the limit is {max_pixels}. "
            "Scale it down, crop it, or raise max_pixels (and PIL.Image.MAX_IMAGE_PIXELS)."
        )
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels: it is empty.")


def _grown(size: tuple[int, int], step: str) -> str:
    return f"an image of {size[0]} x {size[1]} pixels, after {step},"


def _resized(size: tuple[int, int], target: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) after the resize of an image of (width, height)."""
    if isinstance(target, tuple):
        return target
    width, height = size
    longest = int(target * max(size) / min(size))
    return (longest, target) if width <= height else (target, longest)


def _pad_to_square(image: Image.Image, color: tuple[int, ...], max_pixels: int) -> Image.Image:
    edge = max(image.size)
    _check_size((edge, edge), max_pixels, _grown(image.size, "padding to a square"))
    square = Image.new("RGB", (edge, edge), color)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the middle (height, width) of (3, H, W), with zeros beyond the image."""
    out = np.zeros((3, *size), pixels.dtype)
    source, target = [slice(None)], [slice(None)]
    for have, want in zip(pixels.shape[1:], size, strict=True):
        start = (have - want) // 2  # towards minus infinity, as Hugging Face rounds both cases
        source.append(slice(max(0, start), max(0, start) + min(have, want)))
        target.append(slice(max(0, -start), max(0, -start) + min(have, want)))
    out[tuple(target)] = pixels[tuple(source)]
    return out
