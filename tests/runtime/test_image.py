import contextlib
import io
import json
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from visistage.graphs.errors import BundleError, ImageError, ModelError
from visistage.runtime.image.image import (
    FORMATS,
    Preprocessing,
    load_image,
    pixel_key,
    preprocess,
)

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 20, "width": 24},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PADDED = {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def reference(config: dict, image) -> np.ndarray:
    """What transformers' own PIL processor makes of the same picture."""
    transformers = pytest.importorskip("transformers")
    kinds = {
        "CLIPImageProcessor": transformers.CLIPImageProcessorPil,
        "SiglipImageProcessor": transformers.SiglipImageProcessorPil,
        "LlavaImageProcessor": transformers.LlavaImageProcessorPil,
    }
    options = {k: v for k, v in config.items() if k != "image_processor_type"}
    processor = kinds[config["image_processor_type"]](**options)
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


# --- parity with Hugging Face ----------------------------------------------------------------

VARIANTS = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "llava-padded": PADDED,
    "bilinear": {**CLIP, "resample": 2},
    "no-crop": {**CLIP, "do_center_crop": False},
    "crop-beyond-picture": {**CLIP, "crop_size": {"height": 33, "width": 40}},
    "odd-crop": {**CLIP, "crop_size": {"height": 27, "width": 13}},
    "no-resize": {**CLIP, "do_resize": False},
    "no-rescale": {**CLIP, "do_rescale": False},
    "no-normalize": {**CLIP, "do_normalize": False},
    "bytes-only": {**CLIP, "do_normalize": False, "do_rescale": False},
    "integers": {**CLIP, "size": 28, "crop_size": 20},
}


@pytest.mark.parametrize("variant", VARIANTS)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_pixel_values_equal_transformers(variant, height, width, seed):
    config = VARIANTS[variant]
    image = Image.fromarray(noise(height, width, seed=seed))
    ours = preprocess(load_image(image), Preprocessing.from_files(None, config))
    theirs = reference(config, image)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def pictures() -> dict[str, Image.Image]:
    rgba = Image.fromarray(noise(31, 45, 4))
    palette = Image.fromarray(noise(31, 45)).quantize(16)
    clear_palette = palette.copy()
    clear_palette.info["transparency"] = 3
    palette_bytes = palette.copy()
    palette_bytes.info["transparency"] = bytes(range(0, 160, 10))
    clear_colour = Image.fromarray(noise(31, 45) // 128 * 255)
    clear_colour.info["transparency"] = (255, 0, 0)
    return {
        "RGB": Image.fromarray(noise(31, 45)),
        "grey": Image.fromarray(noise(31, 45, 1)),
        "1-bit": Image.fromarray(noise(31, 45, 1)).convert("1"),
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "palette": palette,
        "palette, one clear entry": clear_palette,
        "palette with alpha": palette_bytes,
        "PA": rgba.convert("PA"),
        "RGB, one clear colour": clear_colour,
        "CMYK": Image.fromarray(noise(31, 45, 4), "RGBA").convert("RGB").convert("CMYK"),
        "YCbCr": Image.fromarray(noise(31, 45)).convert("YCbCr"),
        "HSV": Image.fromarray(noise(31, 45)).convert("HSV"),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", pictures())
def test_every_mode_becomes_rgb_as_in_transformers(name):
    image = pictures()[name]
    rgb = load_image(image)
    assert (rgb.mode, rgb.size, rgb.info) == ("RGB", image.size, {})
    ours = preprocess(rgb, Preprocessing.from_files(None, CLIP))
    np.testing.assert_allclose(ours, reference(CLIP, image), atol=1e-6, rtol=0)


# --- what becomes of each kind of picture ------------------------------------------------------


def pixel(image: Image.Image, x: int = 0, y: int = 0):
    return load_image(image).getpixel((x, y))


def test_transparency_shows_white():
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 255))) == (10, 20, 30)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    clear = load_image(saved(palette, transparency=1))
    assert [clear.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


def test_grey_and_one_bit_are_repeated():
    assert pixel(Image.new("L", (1, 1), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (1, 1), 1)) == (255, 255, 255)
    assert load_image(np.full((2, 3), 9, np.uint8)).getpixel((2, 1)) == (9, 9, 9)


def test_cmyk_jpeg():
    image = load_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = image.getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format_):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = load_image(saved(Image.fromarray(values), format_))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert np.asarray(load_image(wide))[0, :, 2].tolist() == [0, 0, 1, 1, 128, 255]


def test_clear_value_of_a_sixteen_bit_picture_is_white():
    image = Image.fromarray(np.array([[500, 0]], np.uint16))
    image.info["transparency"] = 500
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [255, 0]


def test_unknown_ranges_are_refused():
    with pytest.raises(ImageError, match="floating point"):
        load_image(Image.new("F", (2, 2), 0.5))
    with pytest.raises(ImageError, match=r"70000; expected 0\.\.65535"):
        load_image(Image.new("I", (2, 2), 70_000))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    corner = Image.new("RGB", (16, 8))
    corner.paste((255, 0, 0), (0, 0, 8, 4))  # red where x and y are small, as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(corner, "PNG", exif=exif.tobytes()))
    assert image.size == ((16, 8) if orientation < 5 else (8, 16))
    expected = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}
    width, height = image.size
    corners = {
        "tl": (0, 0),
        "tr": (width - 1, 0),
        "bl": (0, height - 1),
        "br": (width - 1, height - 1),
    }
    red = [name for name, at in corners.items() if image.getpixel(at) == (255, 0, 0)]
    assert red == [expected[orientation]]
    assert image.getexif() == {}


def test_damaged_exif_counts_as_none():
    data = saved(Image.new("RGB", (4, 2), (1, 2, 3)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff")
    assert load_image(data).size == (4, 2)


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_an_animation(format_):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "green")]
    data = saved(frames[0], format_, save_all=True, append_images=frames[1:])
    red, _, blue = load_image(data).getpixel((1, 1))
    assert red > 200
    assert blue < 60


def test_colour_profiles_are_dropped_not_applied():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(Image.new("RGB", (2, 2), (9, 8, 7)), icc_profile=profile)
    assert load_image(data).info == {}
    assert load_image(data).getpixel((0, 0)) == (9, 8, 7)


# --- sources -----------------------------------------------------------------------------------


def test_all_sources_give_the_same_picture(tmp_path):
    array = noise(5, 7)
    data = saved(Image.fromarray(array))
    path = tmp_path / "p.png"
    path.write_bytes(data)

    class Pipe(io.RawIOBase):
        inner = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.inner.readinto(buffer)

    late = io.BytesIO(data)
    late.seek(20)
    sources = [path, str(path), data, bytearray(data), memoryview(data), late]
    sources += [io.BufferedReader(Pipe()), Image.open(path), array, array[:, :, :]]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load_image(source)), array)
    backwards = array[::-1, :, ::-1]
    np.testing.assert_array_equal(np.asarray(load_image(backwards)), backwards)


def test_the_callers_picture_is_left_alone():
    image = Image.new("P", (3, 3))
    load_image(image)
    assert image.mode == "P"
    rgb = Image.new("RGB", (1, 1))
    rgb.info["note"] = 1
    assert load_image(rgb) is not rgb
    assert rgb.info == {"note": 1}


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.zeros((4, 4, 3), np.float32), "* 255"),
        (np.zeros((3, 4, 5), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((4, 4, 2), np.uint8), "expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (np.zeros((4,), np.uint8), "expected uint8"),
        (np.zeros((4, 4), bool), "expected uint8"),
    ],
)
def test_unusable_arrays_are_refused_with_a_hint(array, hint):
    with pytest.raises(ImageError, match=re.escape(hint)):
        load_image(array)


def test_sources_that_are_no_picture(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    cases = {
        tmp_path / "none.png": "cannot be opened: No such file",
        tmp_path: "cannot be opened",
        text: "not an image",
        b"": "the bytes given is not an image",
        "https://example.com/cat.jpg": "Download it first",
        "nul\0.png": "cannot be opened",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
        None: "NoneType",
        3: "int",
        io.StringIO("x"): "not an image",
    }
    for source, message in cases.items():
        with pytest.raises(ImageError, match=message):
            load_image(source)


def test_a_pipe_of_text_or_without_end_is_refused():
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    with pytest.raises(ImageError, match="more than"):
        load_image(io.BufferedReader(Endless()), max_pixels=100)

    class Text:
        def read(self, count):
            return "text"

    with pytest.raises(ImageError, match="binary"):
        load_image(Text())


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what we broke
@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_and_corrupt_files(format_, tmp_path):
    data = saved(Image.fromarray(noise(64, 64)), format_)
    random = np.random.default_rng(5)
    for cut in (3, 30, len(data) // 2):
        with pytest.raises(ImageError):
            load_image(data[:cut])
    for _ in range(40):  # whatever is broken, the only error is ours
        broken = bytearray(data)
        for at in random.integers(0, len(broken), 8):
            broken[at] = random.integers(0, 256)
        with contextlib.suppress(ImageError):
            load_image(bytes(broken))
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\b.*damaged or cut short"):
        load_image(tmp_path / "cut")


# --- limits ------------------------------------------------------------------------------------


def declared_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (10_000, 10_000), (8001, 8000)])
@pytest.mark.filterwarnings("error")
def test_huge_pictures_are_refused_before_decoding(width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=rf"{width} x {height}.*limit is 64000000"):
        load_image(declared_png(width, height))


def test_the_limit_is_settable_and_holds_for_every_source():
    array = noise(10, 11)
    for source in (array, Image.fromarray(array), saved(Image.fromarray(array))):
        assert load_image(source, max_pixels=110).size == (11, 10)
        with pytest.raises(ImageError, match=r"11 x 10 = 110 pixels; the limit is 109"):
            load_image(source, max_pixels=109)
    # Pillow refuses this one whatever we allow; the message says so.
    with pytest.raises(ImageError, match=r"more pixels than Pillow opens.*MAX_IMAGE_PIXELS"):
        load_image(declared_png(20_000, 20_000), max_pixels=10**9)


@pytest.mark.parametrize(("width", "height"), [(20, 19_000), (19_000, 20)])
def test_growth_by_resize_or_padding_is_bounded(width, height):
    long = load_image(Image.new("RGB", (width, height)))
    large = {**CLIP, "size": {"shortest_edge": 336}}
    with pytest.raises(ImageError, match=rf"{width} x {height} pixels, after the resize.*319200"):
        preprocess(long, Preprocessing.from_files(None, large))
    with pytest.raises(ImageError, match="padding to a square"):
        preprocess(long, Preprocessing.from_files(None, PADDED))


def bomb(format_: str, side: int = 15_000) -> bytes:
    """A small file whose header declares ``side`` x ``side`` pixels."""
    small, wide = Image.new("P" if format_ == "GIF" else "RGB", (2, 2)), struct.pack("<H", side)
    if format_ == "PNG":
        return declared_png(side, side)
    if format_ == "APNG":
        data = bytearray(
            saved(small, "PNG", save_all=True, append_images=[Image.new("RGB", (2, 2), 9)])
        )
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    if format_ == "WEBP extended":
        data = bytearray(saved(Image.new("RGBA", (2, 2), (1, 2, 3, 4)), "WEBP"))
        data[24:30] = (side - 1).to_bytes(3, "little") * 2
        assert data[12:16] == b"VP8X"
        return bytes(data)
    if format_ == "WEBP lossless":
        data = bytearray(saved(small, "WEBP", lossless=True))
        data[21:25] = (side - 1 | side - 1 << 14).to_bytes(4, "little")
        assert data[12:16] == b"VP8L"
        return bytes(data)
    data = bytearray(saved(small, format_.split()[0]))
    if format_ == "GIF":
        data[6:10] = wide * 2
    elif format_ == "GIF frame":  # the screen is small, its first frame is not
        at = data.index(b",", 13)
        data[at + 5 : at + 9] = wide * 2
    elif format_ == "WEBP":
        data[26:30] = wide * 2
        assert data[12:16] == b"VP8 "
    elif format_ == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif format_ == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    elif format_ == "TIFF":
        return b"II*\0\x08\0\0\0" + struct.pack(
            "<H" + "HHII" * 5 + "I", 5, 256, 4, 1, side, 257, 4, 1, side, 258, 3, 1, 8,
            262, 3, 1, 1, 273, 4, 1, 8, 0,
        )  # fmt: skip
    elif format_ == "PPM":
        return b"P6 %d %d 255\n" % (side, side)
    return bytes(data)


BOMBS = (
    "PNG", "APNG", "GIF", "GIF frame", "WEBP", "WEBP extended", "WEBP lossless", "BMP", "JPEG",
    "TIFF", "PPM",
)  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_000, 14_000, 16_300])
@pytest.mark.parametrize("format_", BOMBS)
def test_a_bomb_of_any_format_is_refused_before_it_takes_memory(format_, side):
    data = bomb(format_, side)
    tracemalloc.start()
    with pytest.raises(ImageError, match="64000000") as caught:
        load_image(data)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert "Error" not in str(caught.value)
    assert "decompression" not in str(caught.value)


@pytest.mark.parametrize("size", [(52_800, 44), (44, 52_800), (1_001, 1), (3, 3_100), (33_000, 33)])
def test_long_sides_are_refused_whatever_the_pixels(size):
    width, height = size
    sources = [declared_png(width, height), np.zeros((height, width), np.uint8)]
    for source in [*sources, Image.new("L", size)]:
        with pytest.raises(ImageError, match=f"{width} x {height} pixels; no side may be longer"):
            load_image(source)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (7, 1), (1, 90), (90, 1), (3, 3), (5, 3), (3, 4)])
def test_odd_shapes_are_images_too(mode, size):
    image = Image.new(mode, size)
    for source in (image, saved(image, "TIFF")):
        for config in (CLIP, SIGLIP, PADDED):
            steps = Preprocessing.from_files(None, config)
            pixels = preprocess(load_image(source), steps)
            assert pixels.shape == (3, *steps.output_size)
            assert np.isfinite(pixels).all()


def test_only_formats_on_the_list_are_opened():
    starts = {
        b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
        b"SIMPLE  =                    T": "FITS",
        b"8BPS\0\1": "Photoshop",
        b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC",
        b"\0\0\1\0\1\0": "icon",
        b"<svg xmlns=": "SVG",
        b"%PDF-1.7": "PDF",
    }
    for start, name in starts.items():
        with pytest.raises(ImageError, match=f"is a {name} file.*Convert it to PNG or JPEG"):
            load_image(start + bytes(64))
    ours = set(FORMATS)
    for format_ in sorted({"JPEG2000", "ICO", "TGA", "PCX", "SGI", "DDS", "IM", "EPS"} - ours):
        with contextlib.suppress(OSError), pytest.raises(ImageError, match="not an image"):
            load_image(saved(Image.new("RGB", (4, 4)), format_))


def test_what_a_decoder_says_stays_inside():
    data = saved(Image.fromarray(noise(64, 64)))
    said = set()
    for cut in range(40, len(data), 997):
        with pytest.raises(ImageError) as caught:
            load_image(data[:cut])
        said.add(str(caught.value))
    for broken in (b"\x89PNG\r\n\x1a\n" + bytes(99), data[:33], b"GIF89a" + bytes(9)):
        with pytest.raises(ImageError) as caught:
            load_image(broken)
        said.add(str(caught.value))
    assert len(said) <= 2, said


class Strange:
    """An array over DLPack that is none."""

    def __dlpack__(self, **options):
        raise RuntimeError("on another device, at 0x7f00")

    def __dlpack_device__(self):
        return 2, 0


def test_arrays_of_others_and_views_without_memory():
    torch = pytest.importorskip("torch")
    array = noise(5, 7)
    assert np.array_equal(np.asarray(load_image(torch.from_numpy(array))), array)
    turned = torch.from_numpy(array.transpose(1, 0, 2).copy()).transpose(0, 1)
    assert np.array_equal(np.asarray(load_image(turned)), array)
    huge = np.broadcast_to(np.uint8(3), (30_000, 30_000))
    for wrong, message in (
        (torch.zeros(4, 4, 3), "uint8"),
        (torch.full((4, 4), float("nan")), "uint8"),
        (torch.zeros(4, 4, requires_grad=True), "DLPack"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), "DLPack"),
        (Strange(), "DLPack"),
        (huge, "limit is 64000000"),
        (np.zeros((4, 4), object), "uint8"),
        (np.zeros((4, 4), "S1"), "uint8"),
        (np.zeros((4, 4), [("a", np.uint8)]), "uint8"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            load_image(wrong)
        assert "0x" not in str(caught.value)


def test_files_that_are_closed_or_too_long(tmp_path):
    file = tmp_path / "p.png"
    file.write_bytes(saved(Image.new("RGB", (4, 4))))
    with file.open("rb") as stream:
        pass
    with pytest.raises(ImageError, match="is it closed"):
        load_image(stream)
    closed = Image.open(file)
    closed.close()
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(closed)
    with file.open("ab") as stream:
        stream.truncate(600 << 20)
    for source in (file, file.open("rb")):
        with pytest.raises(ImageError, match="takes more than"):
            load_image(source)


def test_preprocess_takes_rgb_only():
    with pytest.raises(TypeError, match="load_image"):
        preprocess(Image.new("L", (3, 3)), Preprocessing.from_files(None, CLIP))


# --- the cache key -----------------------------------------------------------------------------


def test_pixel_key_depends_on_pixels_size_and_steps_only():
    array = noise(6, 8)
    steps = Preprocessing.from_files(None, CLIP)
    key = pixel_key(load_image(array), steps)
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert pixel_key(load_image(saved(Image.fromarray(array), "TIFF")), steps) == key
    other = array.copy()
    other[5, 7, 2] ^= 1
    different = [
        pixel_key(load_image(other), steps),
        pixel_key(load_image(array.reshape(8, 6, 3)), steps),
        pixel_key(load_image(np.zeros((30, 100), np.uint8)), steps),
        pixel_key(load_image(np.zeros((100, 30), np.uint8)), steps),
        pixel_key(load_image(array), Preprocessing.from_files(None, {**CLIP, "resample": 2})),
    ]
    assert len({key, *different}) == 6


# --- configuration files -------------------------------------------------------------------------


def test_both_places_are_read_and_must_agree():
    alone = Preprocessing.from_files(None, CLIP)
    assert Preprocessing.from_files({"image_processor": CLIP}, None) == alone
    assert Preprocessing.from_files({"image_processor": CLIP}, CLIP) == alone
    # Files older than transformers 5 hold no picture settings there.
    assert Preprocessing.from_files({"patch_size": 14}, CLIP) == alone
    fast = {**CLIP, "image_processor_type": "CLIPImageProcessorFast"}
    assert Preprocessing.from_files({"image_processor": fast}, CLIP) == alone
    for key, value in {
        "image_mean": [0.5, 0.5, 0.5],
        "crop_size": {"height": 14, "width": 28},
        "size": {"shortest_edge": 30},
        "resample": 2,
        "rescale_factor": 0.5,
        "do_rescale": False,
    }.items():
        name = "rescale_factor" if key == "do_rescale" else key
        with pytest.raises(ModelError, match=f"disagree on {name}"):
            Preprocessing.from_files({"image_processor": {**CLIP, key: value}}, CLIP)
    with pytest.raises(ModelError, match="disagree on image_processor_type"):
        Preprocessing.from_files({"image_processor": SIGLIP}, CLIP)


def test_transformers_own_files_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {k: v for k, v in CLIP.items() if k != "image_processor_type"}
    transformers.CLIPImageProcessorPil(**options).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    raw = json.loads(file.read_text())
    assert Preprocessing.from_files(None, raw) == Preprocessing.from_files(None, CLIP)


@pytest.mark.parametrize("key", ["image_mean", "image_std", "size", "crop_size"])
def test_what_must_not_be_guessed_is_missed_by_name(key):
    config = {k: v for k, v in CLIP.items() if k != key}
    with pytest.raises(ModelError, match=rf"preprocessor_config\.json has no {key}"):
        Preprocessing.from_files(None, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "PixtralImageProcessor"),
        ({"image_processor_type": None}, "None"),
        ({"size": {"longest_edge": 9}}, "longest_edge"),
        ({"size": {"shortest_edge": 10**6}}, "size cannot be 1000000"),
        ({"size": {"shortest_edge": 0}}, "size cannot be 0"),
        ({"resample": 9}, "resample cannot be 9"),
        ({"resample": None}, "resample cannot be None"),
        ({"image_std": [0.1, 0, 0.1]}, "image_std cannot be"),
        ({"image_mean": [0.1, 0.2]}, "image_mean cannot be"),
        ({"image_mean": [0.1, 0.2, float("nan")]}, "image_mean cannot be"),
        ({"rescale_factor": "1/255"}, "rescale_factor cannot be"),
        ({"use_square_size": True}, "use_square_size"),
    ],
)
def test_unusable_settings_are_named(change, message):
    with pytest.raises(ModelError, match=message):
        Preprocessing.from_files(None, {**CLIP, **change})


def test_no_file_at_all():
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json"):
        Preprocessing.from_files({"patch_size": 14}, None)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_manifest_round_trip(config):
    steps = Preprocessing.from_files(None, config)
    assert Preprocessing.from_dict(json.loads(json.dumps(steps.to_dict()))) == steps
    assert hash(steps) == hash(Preprocessing.from_dict(steps.to_dict()))


def test_manifest_is_read_strictly():
    data = Preprocessing.from_files(None, CLIP).to_dict()
    with pytest.raises(BundleError, match="colour: found an unknown key"):
        Preprocessing.from_dict({**data, "colour": 1})
    with pytest.raises(BundleError, match="mean: found nothing"):
        Preprocessing.from_dict({k: v for k, v in data.items() if k != "mean"})
    with pytest.raises(BundleError, match="resample: found 'bicubic', expected an integer"):
        Preprocessing.from_dict({**data, "resample": "bicubic"})
    with pytest.raises(BundleError, match="resample cannot be 9"):
        Preprocessing.from_dict({**data, "resample": 9})
    with pytest.raises(BundleError, match="together"):
        Preprocessing.from_dict({**data, "std": None})


def test_output_size():
    assert Preprocessing.from_files(None, CLIP).output_size == (28, 28)
    assert Preprocessing.from_files(None, SIGLIP).output_size == (20, 24)
    assert Preprocessing.from_files(None, VARIANTS["no-crop"]).output_size is None
