"""Names, types and shapes of inputs and outputs of the graphs that make an image's visual rows.

Symbols beside those of ``contract``: N is the visual rows of an image, ``TILES`` what its pixels
are cut into. Where every image is brought to one canvas there are none.
"""

from __future__ import annotations

from dataclasses import replace

from .config import ModelConfig
from .contract import GraphSpec, TensorSpec, injected_spec
from .errors import PlanError
from .plan.plan import StagePlan
from .precision import NO_FALLBACK, Fp32Fallback
from .selectors.entry import PROJECTED, READINGS
from .selectors.registry import ENTRY_SELECTORS
from .vision_config import PATCHES

TILES = "tiles"
"""Symbol of the tiles of an image, where the vision graph takes several."""

WINDOWS = "windows"
"""Symbol of the windows of an image that an encoder of patches attends in."""

NEAREST_WORDS = 3
"""Ids of the vocabulary that the vision graph names for each row, where a selector reads them."""


def projects_later(config: ModelConfig, plan: StagePlan) -> bool:
    """Return whether only chosen rows are projected: no selector has to see them projected, and
    they are not put in lines behind the projector.
    """
    if plan.entry is None or config.packs:
        return False
    return not {*ENTRY_SELECTORS[plan.entry.selector].reads} & {*PROJECTED}


def vision_readings(config: ModelConfig, plan: StagePlan) -> tuple[str, ...]:
    """Return what the vision graph hands out: names of ``EncoderReadings``, in their order.

    Without an entry that is the visual rows alone.
    """
    if plan.entry is None:
        return ("rows",)
    reads = {*ENTRY_SELECTORS[plan.entry.selector].reads}
    reads.add("features" if projects_later(config, plan) else "rows")
    return tuple(name for name in READINGS if name in reads)


def vision_spec(
    config: ModelConfig, plan: StagePlan, dtype: str, fallback: Fp32Fallback = NO_FALLBACK
) -> GraphSpec:
    """Return the contract of the encoder: pixels in, out what the plan's entry reads.

    Without an entry the projector is in it, and one row per visual token comes out. What is added
    to the rows within the decoder comes out with it, for all visual tokens.

    Raises:
        PlanError: an entry whose selector the encoder has nothing for.
    """
    vision, width = config.vision, config.feature_width
    tokens, count = _image_sizes(config)
    batch = 1 if config.varies else "B"
    outputs = {
        "similarity": TensorSpec("similarity", "float32", (batch, tokens, tokens)),
        "row_similarity": TensorSpec("row_similarity", "float32", (batch, tokens, tokens)),
        "vocabulary": TensorSpec("vocabulary", "int64", (batch, tokens, NEAREST_WORDS)),
        "rows": TensorSpec(
            "visual_rows", fallback.rows_dtype(dtype), (batch, tokens, config.text.hidden)
        ),
        "features": TensorSpec("features", dtype, (batch, tokens, width)),
        "class_row": TensorSpec("class_row", dtype, (batch, width)),
        "saliency": TensorSpec("saliency", "float32", (batch, tokens)),
        "keys": TensorSpec("keys", "float32", (batch, tokens, vision.hidden // vision.heads)),
    }
    names = vision_readings(config, plan)
    _check_entry(config, plan)
    if not config.has_class_row:
        names = tuple(name for name in names if name != "class_row")
    unread = [name for name in names if vision.kind == PATCHES and name not in PROJECTED]
    if unread and plan.entry is not None:
        known = ENTRY_SELECTORS.items()
        rows = " or ".join(name for name, own in known if {*own.reads} & {*PROJECTED})
        raise PlanError(
            f"entry {plan.entry.text} reads {unread[0]}, which an encoder of patches does not hand "
            f"out for its rows. Take {rows}, or select within the decoder"
        )
    return GraphSpec(
        inputs=(
            TensorSpec("pixels", "float32", pixel_shape(config, count)),
            *(_patch_inputs(config, count) if vision.kind == PATCHES else ()),
            *(_packing(config, tokens) if config.packs else ()),
        ),
        outputs=(
            *(outputs[name] for name in names),
            *(
                replace(own, shape=(batch, *own.shape[1:]))
                for layer in config.text.inject
                for own in [injected_spec(config.text, layer, tokens, fallback.rows_dtype(dtype))]
            ),
        ),
    )


def _check_entry(config: ModelConfig, plan: StagePlan) -> None:
    """Refuse an entry that cannot be had of a model whose rows are not those of patches alone."""
    if plan.entry is None:
        return
    about = f"entry {plan.entry.text}: in a model of type {config.family}"
    if config.packs and "features" in ENTRY_SELECTORS[plan.entry.selector].reads:
        raise PlanError(
            f"{about} lines of tokens are made behind the projector, and this merges what comes in "
            "front of it. Take scope or divprune, or select within the decoder"
        )
    if config.parted and plan.span != plan.visual_tokens:
        raise PlanError(
            f"{about} text stands among the tokens of an image, so they keep their positions. Take "
            "scope or divprune, without positions=renumbered"
        )


def _image_sizes(config: ModelConfig) -> tuple[int | str, int | str]:
    """Return the visual rows of an image, and the images or tiles of a call of the vision graph."""
    if not config.varies:
        return config.visual_tokens, "B"
    if config.canvas is None:
        return "N", TILES
    return config.visual_tokens, config.most_tiles


def pixel_shape(config: ModelConfig, tiles: int | str) -> tuple[int | str, ...]:
    """Return the shape of the pixels of so many tiles; where patches are tiles, each is flat."""
    vision = config.vision
    if vision.kind == PATCHES:
        return tiles, vision.channels * vision.patch_size**2
    return tiles, vision.channels, vision.image_size, vision.image_size


def _patch_inputs(config: ModelConfig, count: int | str) -> tuple[TensorSpec, ...]:
    """Return what an encoder of patches takes besides, in the order of its layouts' feeds."""
    vision = config.vision
    of_image: int | str = WINDOWS
    if config.canvas is not None and vision.window:
        of_image = len(config.layout(*config.canvas).feeds["slots"])
    learned = (
        TensorSpec("taps", "int32", (count, 4)),
        TensorSpec("weights", "float32", (count, 4)),
    )
    windows = (
        TensorSpec("slots", "int32", (of_image, vision.window_patches)),
        TensorSpec("places", "int32", (count,)),
    )
    return (
        TensorSpec("turns", "int32", (count, 2)),
        *(learned if vision.learned else ()),
        *(windows if vision.window else ()),
    )


def _packing(config: ModelConfig, tokens: int | str) -> tuple[TensorSpec, ...]:
    """Return what says which rows of tiles make each of the rows of an image."""
    if config.shrinks:
        shape = (tokens, 4)
        return TensorSpec("pack", "int64", shape), TensorSpec("weights", "float32", shape)
    return (TensorSpec("pack", "int64", (tokens,)),)


def project_spec(
    config: ModelConfig, plan: StagePlan, dtype: str, fallback: Fp32Fallback = NO_FALLBACK
) -> GraphSpec:
    """Return the contract of the projector alone: features of chosen rows in, visual rows out."""
    count: tuple[int | str, int | str] = (1, "N") if config.varies else ("B", plan.entering)
    rows = TensorSpec("visual_rows", fallback.rows_dtype(dtype), (*count, config.text.hidden))
    features = TensorSpec("features", dtype, (*count, config.feature_width))
    return GraphSpec((features,), (rows,))
