"""The families that there are, and those that are refused by name: no other module lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config_fields import mapping, reject_value
from ..errors import ImageSizeError, ModelError
from ..fields import show
from .family import Family, Size
from .internvl import INTERNVL
from .llava import LLAVA
from .llava_next import LLAVA_NEXT
from .llava_onevision import LLAVA_ONEVISION
from .qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from .smolvlm import IDEFICS3, SMOLVLM

if TYPE_CHECKING:
    from ..config import ModelConfig

_ALL = (
    LLAVA,
    INTERNVL,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN3_VL,
    QWEN2_5_VL,
    QWEN2_VL,
    SMOLVLM,
    IDEFICS3,
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}

_STATES = (
    "most of its layers keep a running state instead of keys and values, and a plan has no way to "
    "hide a row from a state"
)
_REMOTE = "it is not a part of transformers but code of its own, which is not run"
REFUSED: Mapping[str, str] = {  # beginnings of model types: why
    "paligemma": "its image rows see the question, so an image cannot be computed once",
    "gemma3": "its sliding windows, four norms a layer and two ropes are not written yet",
    "gemma4": "its heads of 512 numbers and shared keys and values fit no attention kernel",
    "phi4_multimodal": "its rope changes with the length, and its images change the weights",
    "phi3_v": _REMOTE,
    "minicpmv4": _STATES,
    "minicpm": _REMOTE,
    "mobile": _REMOTE,
    "moondream": _REMOTE,
    "internvl_chat": "this is its authors' format; take the conversion, whose name ends in -hf",
    "qwen3_5": _STATES,
    "qwen4": _STATES,
    "lfm2_vl": _STATES,
    "qwen3_vl_moe": "its experts are not written; take a dense one",
    "fast_vlm": "its convolutional encoder is not written",
    "llava_qwen2": "its convolutional encoder is not written",
    "deepseek": "its encoder and its experts are not written",
}

_ORIGINAL = re.compile(r"Llava\w*ForCausalLM")  # of https://github.com/haotian-liu/LLaVA


def supported() -> str:
    """Return the classes that can be read, and their parts."""
    from ..text_config import DECODERS  # reads configs by this module

    names = ", ".join(family.architecture for family in FAMILIES.values())
    return f"{names}, with a decoder of type {', '.join(DECODERS)}"


def read_config(data: Mapping[str, Any], processor: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read a ``config.json``; ``processor``: the image processor's file, which has the limits.

    Raises:
        ModelError: a family that is refused or unknown, or what its own reader refuses.
    """
    family = _family_of(mapping("config.json", data))
    config = family.read(data)
    if family.limits is not None and processor is not None:
        return config.within(family.limits(config, processor))
    return config


def with_budget(config: ModelConfig, tokens: int | None) -> ModelConfig:
    """Return the config under which no image has more than ``tokens`` rows; None: as it is.

    Raises:
        ModelError: a family whose images have one count, or fewer tokens than any image has.
    """
    if tokens is None:
        return config
    family = FAMILIES[config.family]
    if family.budgeted is None:
        raise ModelError(
            f"every image takes {config.visual_tokens} tokens in a model of type {config.family}, "
            "which no option of its processor changes. Leave out --image-tokens, or keep fewer of "
            f"them by the plan: --plan visipruner:keep={max(1, config.visual_tokens // 9)}"
        )
    return config.within(family.budgeted(config, tokens))


def with_canvas(config: ModelConfig, canvas: Size | None) -> ModelConfig:
    """Return the config under which every image is brought to one height and width first.

    Its own processor leaves an image of that size as it is: an image is resized once.

    Raises:
        ModelError: a family that makes squares of all images, or a size that its processor changes.
    """
    if canvas is None:
        return config
    written = "{}x{}".format(*canvas)
    if not config.varies:
        raise ModelError(
            f"every image takes {config.visual_tokens} tokens in a model of type {config.family}, "
            "whatever its size. Leave out --canvas"
        )
    try:
        layout = FAMILIES[config.family].layout(config, *canvas)
    except ImageSizeError as error:
        raise ModelError(f"--canvas {written} (height x width): {error}") from error
    becomes = layout.padded or layout.resizes[-1]
    if {*layout.resizes, becomes} != {canvas}:
        raise ModelError(
            f"--canvas is {written}, height x width; a model of type {config.family} would bring "
            "such an image to {}x{}. Give that, or another size that it leaves as it is".format(
                *becomes
            )
        )
    return replace(config, canvas=canvas)


def smaller_images(config: ModelConfig, tokens: int = 576) -> str:
    """Return the option that gives images about ``tokens`` rows, or a few more where none are so
    small; nothing where images have as few anyway, or no such option.
    """
    shares = (config.visual_tokens * eighths // 8 for eighths in range(1, 8))
    for wanted in sorted({tokens, *(share for share in shares if share > tokens)}):
        with suppress(ModelError):
            if with_budget(config, wanted).visual_tokens < config.visual_tokens:
                return f"--image-tokens {wanted}"
    return ""


def _family_of(data: Mapping[str, Any]) -> Family:
    names = data.get("architectures") or []
    if not isinstance(names, list):
        reject_value("architectures", names, "a list of names")
    known = {family.architecture: family for family in FAMILIES.values()}
    guess = next((known[name].name for name in map(str, names) if name in known), None)
    kind = data.get("model_type", guess)
    original = [name for name in names if _ORIGINAL.fullmatch(str(name))]
    original += ["mm_vision_tower"] if "mm_vision_tower" in data else []
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family and not original and (not names or family.architecture in names):
        return family
    found = ", ".join(map(str, names)) if names else "no architecture"
    hint = "Try llava-7b."
    why = [why for start, why in REFUSED.items() if str(kind).startswith(start)]
    if original:
        hint = (
            f"This is the original LLaVA format ({show(original[0])}); use its conversion to "
            "Hugging Face's, such as llava-7b."
        )
    reason = f": {why[0]}" if why else ""
    raise ModelError(
        f"config.json describes {show(found)} (model_type {show(kind)}), which is not "
        f"supported{reason}. Supported: {supported()}. {hint}"
    )
