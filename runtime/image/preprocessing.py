"""A checkpoint's image preprocessing: read from its files, kept in the manifest.

Hugging Face describes the same steps in two files and with many switches; here they become one
short list of steps in their order. This module reads and checks; ``image.py`` applies them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...graphs.errors import BundleError, ModelError
from ...graphs.fields import from_json, is_number, to_json

_MAX_EDGE = 16_384  # of a configured size; a typing error there must not ask for gigabytes
_BICUBIC = 3  # as configs and Pillow number it
# Field here -> key there, where a message should name the latter.
_KEYS = {
    "processor": "image_processor_type",
    "pad_color": "do_pad",
    "mean": "image_mean",
    "std": "image_std",
}
_HAS_CROP = {
    "CLIPImageProcessor": True,
    "LlavaImageProcessor": True,
    "SiglipImageProcessor": False,
    "GotOcr2ImageProcessor": False,
    "LlavaNextImageProcessor": True,
    "LlavaOnevisionImageProcessor": False,
    "Qwen2VLImageProcessor": False,
    "SmolVLMImageProcessor": False,
    "Idefics3ImageProcessor": False,
}
_LAID_OUT = ("Qwen2VLImageProcessor",)  # their sizes are limits, which a layout has


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an RGB image to pixel values, in their order; None leaves a step out.

    Attributes:
        processor: the Hugging Face class whose steps these are.
        pad_color: R, G, B in 0..255 of the bars that make the image square, before the resize.
        size: (height, width) in pixels, of a tile where images are cut into tiles; or the length
            of the shorter edge alone.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
        crop_size: (height, width) cut from the centre; black where the image is smaller.
        rescale_factor: multiplies the values 0..255.
        mean, std: per channel, subtracted and divided by after that.
    """

    processor: str
    pad_color: tuple[int, int, int] | None
    size: int | tuple[int, int] | None
    resample: int
    crop_size: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self) -> None:
        _checked({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_files(
        cls,
        processor_config: Mapping[str, Any] | None,
        preprocessor_config: Mapping[str, Any] | None,
    ) -> "Preprocessing":
        """Read a checkpoint's ``processor_config.json`` and ``preprocessor_config.json``.

        Switches that are absent take the class defaults of Hugging Face; sizes, mean and std that
        a step needs must be there. ``do_convert_rgb`` is not read: images are always RGB here.

        Args:
            processor_config: the parsed file or None; counts where it has an "image_processor".
            preprocessor_config: the parsed file or None.

        Raises:
            ModelError: nothing to read, an unknown processor, a missing or impossible value, or two
                files that contradict each other.
        """
        nested = (processor_config or {}).get("image_processor")
        found = {"processor_config.json": nested, "preprocessor_config.json": preprocessor_config}
        read = {name: _read(raw, name) for name, raw in found.items() if raw is not None}
        if not read:
            raise ModelError(
                "the checkpoint does not say how images are prepared: expected "
                "preprocessor_config.json, or processor_config.json with an 'image_processor'. "
                "Download the file from where the checkpoint came from."
            )
        first, *others = read.values()
        for other in others:
            for key in first:
                if first[key] != other[key]:
                    raise ModelError(
                        f"processor_config.json and preprocessor_config.json disagree on "
                        f"{_KEYS.get(key, key)}: {first[key]} and {other[key]}. Correct or remove "
                        "the wrong file."
                    )
        return cls(**first)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data for the manifest."""
        return to_json(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Return the inverse of ``to_dict``.

        Raises:
            BundleError: a missing or unknown key, or a value of the wrong kind.
        """
        again = "Rebuild the bundle with this version of visistage."
        try:
            return from_json(cls, data, BundleError, again, "manifest.json: preprocessing")
        except ModelError as error:
            raise BundleError(f"manifest.json: preprocessing: {error} {again}") from None

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None when it depends on the image."""
        return self.crop_size or (self.size if isinstance(self.size, tuple) else None)


def _read(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return one file's fields of ``Preprocessing``, checked."""
    if not isinstance(raw, Mapping):
        raise ModelError(f"{file}: expected an object that describes an image processor.")
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    kind = str(kind).replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in _HAS_CROP:
        raise ModelError(
            f"{file} names the image processor {kind}; this version knows "
            f"{', '.join(_HAS_CROP)}. Use a checkpoint with one of those."
        )

    def on(name: str, default: bool) -> bool:
        return default if raw.get(name) is None else bool(raw[name])

    def need(name: str) -> Any:
        if raw.get(name) is None:
            raise ModelError(
                f"{file} has no {name}, and a guessed one would give wrong answers in silence. "
                "Copy the value from the original checkpoint."
            )
        return raw[name]

    pad = on("do_pad", False)
    for name, used in (("use_square_size", True), ("pad_size", pad)):
        if raw.get(name) and used:
            raise ModelError(f"{file} sets {name}, which is not supported. Remove it.")
    normalize = on("do_normalize", True)
    square = pad and kind == "LlavaImageProcessor"  # elsewhere it pads a batch: nothing for one
    mean = _per_channel(need("image_mean")) if normalize or square else None
    resizes = on("do_resize", True)
    if kind in _LAID_OUT and not resizes:
        raise ModelError(f"{file} sets do_resize to false, which is not supported. Remove it.")
    values = {
        "processor": kind,
        "pad_color": tuple(int(m * 255) for m in mean or ()) if square else None,
        "size": _size(raw, need, file) if resizes and kind not in _LAID_OUT else None,
        "resample": raw.get("resample", _BICUBIC) if resizes else _BICUBIC,
        "crop_size": None,
        "rescale_factor": None,
        "mean": mean if normalize else None,
        "std": _per_channel(need("image_std")) if normalize else None,
    }
    if on("do_center_crop", _HAS_CROP[kind]):
        crop = _edges(need("crop_size"), "crop_size", file)
        values["crop_size"] = (crop, crop) if isinstance(crop, int) else crop
    if on("do_rescale", True):
        values["rescale_factor"] = raw.get("rescale_factor", 1 / 255)
    try:
        return _checked(values)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def _size(raw: Mapping[str, Any], need: Any, file: str) -> Any:
    """Return the size that images are brought to; of a grid of tiles that of one."""
    tile = raw.get("max_image_size")
    if isinstance(tile, Mapping) and tile.get("longest_edge"):
        return (tile["longest_edge"],) * 2
    return _edges(need("size"), "size", file)


def _per_channel(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3


def _edges(value: Any, name: str, file: str) -> Any:
    if isinstance(value, Mapping):
        given = {key: edge for key, edge in value.items() if edge is not None}
        if set(given) == {"height", "width"}:
            return given["height"], given["width"]
        if set(given) == {"shortest_edge"}:
            return given["shortest_edge"]
        raise ModelError(
            f"{file}: {name} is {dict(value)}; supported are {{height, width}} and "
            "{shortest_edge}."
        )
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same values.

    Raises:
        ModelError: naming the first that no step could work with.
    """

    def whole(value: Any, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def all_of(value: Any, count: int, test: Any) -> bool:
        return isinstance(value, tuple) and len(value) == count and all(map(test, value))

    def edge(value: Any) -> bool:
        return whole(value, 1, _MAX_EDGE)

    tests = {
        "processor": lambda v: v in _HAS_CROP,
        "pad_color": lambda v: v is None or all_of(v, 3, lambda c: whole(c, 0, 255)),
        "size": lambda v: v is None or edge(v) or all_of(v, 2, edge),
        "resample": lambda v: whole(v, 0, 5),
        "crop_size": lambda v: v is None or all_of(v, 2, edge),
        "rescale_factor": lambda v: v is None or (is_number(v) and v > 0),
        "mean": lambda v: v is None or all_of(v, 3, is_number),
        "std": lambda v: v is None or all_of(v, 3, lambda s: is_number(s) and s > 0),
    }
    for name, test in tests.items():
        if not test(values[name]):
            raise ModelError(f"{_KEYS.get(name, name)} cannot be {values[name]!r}.")
    if (values["mean"] is None) != (values["std"] is None):
        raise ModelError("image_mean and image_std must be given together.")
    return values
