"""An image from any source to RGB to pixel values, like those of Hugging Face's PIL processors.

    source ──load_image──▶ RGB image ──preprocess──▶ (3, H, W) float32
                               │
                               └──pixel_key──▶ its key in caches

Files are told apart by their content, and only formats on a list are opened. Bytes and sizes are
checked before anything is decoded. ``load_image`` says how each kind of image is converted. This
module knows neither models nor prompts.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ...graphs.errors import ImageError, ImageFormatError, ImageSizeError
from ...graphs.families.family import ImageLayout, in_blocks
from .preprocessing import Preprocessing

__all__ = ["FORMATS", "MAX_PIXELS", "Preprocessing", "load_image", "pixel_key", "prepare"]

MAX_PIXELS = 64_000_000
MAX_SIDE, MAX_RATIO = 32_768, 1_000
"""Longest side in pixels, and how many times it may be the shorter one."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats, of many that Pillow opens: EPS would start a program, others had holes often."""

_FOREIGN = {  # what a file of another format begins with
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"SIMPLE  =": "FITS",
    b"8BPS": "Photoshop",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"\0\0\1\0": "icon",
    b"icns": "icon",
    b"DDS ": "DirectDraw",
    b"qoif": "QOI",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance",
    b"\xff\xfe": "gd",
    b"\0\0\1\xba": "MPEG",
    b"\0\0\1\xb3": "MPEG",
    b"\x1f\x8b": "gzip",
    b"PK\3\4": "zip",
}
_FOREIGN_BOXES = {  # after ftyp, at byte 8
    b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"hevc": "HEIC",
    b"isom": "MP4", b"mp42": "MP4", b"mp41": "MP4", b"qt  ": "QuickTime",
}  # fmt: skip

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray
"""Besides these, any array that offers DLPack from this CPU, such as a torch tensor."""


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
            image; or an array (H, W), (H, W, 3) or (H, W, 4) of uint8, of NumPy or over DLPack.
        max_pixels: largest width x height that is decoded. Whatever it is, no side may be longer
            than ``MAX_SIDE``, nor ``MAX_RATIO`` times the other.

    Raises:
        ImageError: missing, unsupported, damaged or too large.
    """
    if hasattr(source, "__dlpack__") and not isinstance(source, np.ndarray):
        source = _from_dlpack(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        _check_source(source.size, max_pixels, "the image")
        return _decode(source, "the image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        file = _seekable(io.BytesIO(source), max_pixels)
        return _read_file(file, "the bytes given", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _read_path(source, max_pixels)
    if hasattr(source, "read"):
        try:
            file = _seekable(source, max_pixels)
        except (OSError, ValueError) as error:
            raise ImageError(
                "the file object cannot be read; is it closed? Open the image again."
            ) from error
        return _read_file(file, "the file object", max_pixels)
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


def prepare(image: Image.Image, preprocessing: Preprocessing, layout: ImageLayout) -> np.ndarray:
    """Return the pixels of an RGB image as the vision graph takes them, laid out by ``layout``.

    A picture of tiles is brought to their grid and cut, row by row, with the whole in one more;
    where patches are tiles, square by square, and each is flat.

    Raises:
        ImageError: as ``preprocess``.
    """
    if not layout.resizes:
        return preprocess(image, preprocessing)[None]
    filter_, laid = Image.Resampling(preprocessing.resample), image
    for height, width in layout.resizes:
        laid = laid.resize((width, height), filter_)
    pixels = np.asarray(laid)
    if layout.padded is not None:
        gaps = [full - own for full, own in zip(layout.padded, pixels.shape, strict=False)]
        pixels = np.pad(pixels, [*((gap // 2, gap - gap // 2) for gap in gaps), (0, 0)])
    rows, columns = layout.grid
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    tiles = pixels.reshape(rows, high, columns, wide, 3).swapaxes(1, 2)
    tiles = in_blocks(tiles, layout.merge or 1)
    if layout.whole:
        shown = laid if layout.whole_of == "resized" else image
        squeezed = np.asarray(shown.resize((wide, high), filter_))[None]
        ordered = [squeezed, tiles] if layout.whole == "first" else [tiles, squeezed]
        tiles = np.concatenate(ordered)
    out = np.empty((len(tiles), 3, high, wide), np.float32)
    for channel, table in enumerate(_values(preprocessing)):
        np.take(table, tiles[..., channel], out=out[:, channel], mode="clip")
    return out.reshape(len(out), -1) if layout.merge else out


@functools.cache
def warm_up(preprocessing: Preprocessing) -> None:
    """Pay what the first image of a process costs, before anything is timed: decoders, tables."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    with contextlib.suppress(ImageError):  # settings that refuse so small an image
        preprocess(load_image(file.getvalue()), preprocessing)


@functools.cache
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


def pixel_key(
    image: Image.Image, preprocessing: Preprocessing, layout: ImageLayout | None = None
) -> str:
    """Return the SHA-256 (hex) of an RGB image's size and pixels and of their preprocessing.

    Two files with the same decoded pixels have one key.
    """
    recipe = json.dumps(preprocessing.to_dict(), sort_keys=True)
    if layout is not None and layout.resizes:  # otherwise the recipe says all
        sources = layout.whole, layout.whole_of
        recipe += f" {layout.resizes} {layout.padded} {layout.grid} {sources}"
    digest = hashlib.sha256(f"{image.mode} {image.size} {recipe}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


# --- reading -------------------------------------------------------------------------------


def _from_dlpack(source: Any) -> np.ndarray:
    try:
        return np.from_dlpack(source)
    except Exception as error:  # of any library, over a device, a type or a gradient
        raise ImageError(
            f"the {type(source).__name__} cannot be read over DLPack. Pass a uint8 array of this "
            "CPU: tensor.detach().cpu().numpy()"
        ) from error


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
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
    _check_source((array.shape[1], array.shape[0]), max_pixels, "the array")  # a view may be tiny
    return Image.fromarray(np.ascontiguousarray(array))


def _read_path(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    if str(path).lower().startswith(("http://", "https://", "data:")):
        raise ImageError(
            f"{str(path)[:80]} is an address, not a file. Download it first and give its path."
        )
    try:
        with Path(path).open("rb") as file:
            return _read_file(_seekable(file, max_pixels), str(path), max_pixels)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"the image {path} cannot be opened: {reason}. Check the path.") from error


def _seekable(file: Any, max_pixels: int) -> Any:
    """Return the file object itself, or its content when it is a pipe.

    Raises:
        ImageError: more bytes than an image of ``max_pixels`` can have, or text.
    """
    most = 8 * max_pixels + 2**20  # no supported format needs more, header included
    if hasattr(file, "seekable") and file.seekable():
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
    else:
        data = file.read(most + 1)
        if not isinstance(data, bytes):
            raise ImageError("the file object yields text; open the image in binary mode ('rb').")
        size, file = len(data), io.BytesIO(data)
    if size > most:
        raise ImageSizeError(
            f"the image takes more than {most} bytes; that is none of {max_pixels} pixels or "
            "less. Pass a larger max_pixels."
        )
    return file


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # registers every decoder that this Pillow was built with
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read_file(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        head = file.read(32)
        file.seek(0)
        if (size := _webp_size(head)) is not None:  # Pillow makes room for it as it opens one
            _check_source(size, max_pixels, name)
        image = _open(file)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageSizeError(
            f"{name} has more pixels than Pillow opens; the limit here is {max_pixels}. Scale it "
            "down, crop it, or raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # a decoder may raise anything at all over a damaged header
        if isinstance(head, bytes) and _is_listed(head):
            raise _damaged(name) from error
        kind = _foreign(head) if isinstance(head, bytes) else None
        what = f"is a {kind} file, which is" if kind else "is"
        raise ImageFormatError(
            f"{name} {what} not an image that can be read. Supported: {', '.join(_formats())}. "
            "Convert it to PNG or JPEG."
        ) from error
    with image:
        _check_source(image.size, max_pixels, name)
        return _decode(image, name)


def _open(file: Any) -> Image.Image:
    with warnings.catch_warnings():
        # Of half of the size that it refuses; ours is checked next.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=_formats())


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Return width and height of the canvas that the beginning of a WebP file declares."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    kind, number = head[12:16], partial(int.from_bytes, byteorder="little")
    if kind == b"VP8X":
        return 1 + number(head[24:27]), 1 + number(head[27:30])
    if kind == b"VP8L":
        bits = number(head[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return number(head[26:28]) & 0x3FFF, number(head[28:30]) & 0x3FFF


def _is_listed(head: bytes) -> bool:
    """Return whether a file that begins so is of a supported format."""
    accepts = [Image.OPEN[name][1] for name in _formats()]
    return any(accept is not None and accept(head) is True for accept in accepts)


def _foreign(head: bytes) -> str | None:
    """Return the name of a format that is known and not supported."""
    if head[4:8] == b"ftyp":
        return _FOREIGN_BOXES.get(head[8:12])
    return next((name for start, name in _FOREIGN.items() if head.startswith(start)), None)


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF: the pixels are sound all the same
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # a decoder may raise anything at all over damaged data
        raise _damaged(name) from error


def _damaged(name: str) -> ImageError:
    return ImageError(
        f"{name} cannot be decoded; it is damaged or cut short. Fetch it again, or save it anew "
        "with an image editor."
    )


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
        raise ImageSizeError(
            f"{name} has {width} x {height} = {width * height} pixels; the limit is {max_pixels}. "
            "Scale it down, crop it, or raise max_pixels (and PIL.Image.MAX_IMAGE_PIXELS)."
        )
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels: it is empty.")


def _check_source(size: tuple[int, int], max_pixels: int, name: str) -> None:
    _check_size(size, max_pixels, name)
    width, height = size
    if max(size) > MAX_SIDE or max(size) > MAX_RATIO * min(size):
        raise ImageSizeError(
            f"{name} has {width} x {height} pixels; no side may be longer than {MAX_SIDE}, nor "
            f"{MAX_RATIO} times the other. Crop it."
        )


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
