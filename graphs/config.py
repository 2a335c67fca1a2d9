"""The contents of a checkpoint's ``config.json``, as frozen data. Standard library only.

    ModelConfig   image token, feature layers, projector
    ├── TextConfig    the decoder: Llama's shape, whatever its name (llama, mistral, qwen2)
    │   └── Rope
    └── VisionConfig  the vision encoder: CLIP or SigLIP (``vision_config.py``)

``from_hf`` reads Hugging Face configs leniently: published files omit what equals the class default
of transformers (LLaVA-1.5's decoder is little more than "llama"), so those defaults are written
here. ``to_dict`` and ``from_dict`` are the strict form that a bundle's manifest carries. What would
silently compute something else is refused: an unknown family, a sliding window that hides a row, a
rope that depends on the length within the context. Errors are ``ModelError`` and name the field as
``config.json`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from .config_fields import (
    count,
    divides,
    flag,
    reject_value,
    word,
)
from .errors import ModelError
from .fields import from_json, to_json
from .fusion import NO_FUSION, Fusion
from .text_config import REBUILD, TextConfig
from .vision_config import ACTIVATIONS, PATCHES, VisionConfig

if TYPE_CHECKING:
    from .families.family import Family, ImageLayout

_MOST_PIXELS = 1 << 30
_MOST_EDGE = 1 << 14


@dataclass(frozen=True)
class Limits:
    """Limits of what an image becomes, as its processor has them; a family says of what.

    least, most: tiles, or pixels. sizes: (height, width) that one is chosen of; with ``most``, what
    is larger than so many tiles is shrunk behind the encoder.
    """

    least: int = 0
    most: int = 0
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        count("limits.most", self.most, _MOST_PIXELS, least=0)
        count("limits.least", self.least, self.most, least=0)
        for size in self.sizes:
            for edge in size:
                count("limits.sizes", edge, _MOST_EDGE)


@dataclass(frozen=True)
class ModelConfig:
    """A model: vision encoder, projector, decoder and the place of images."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    feature_layers: tuple[int, ...] = (-2,)  # hidden states of the encoder; 0 is its embedding
    select: Literal["default", "full"] = "default"  # default: without each state's first row
    projector_activation: str = "gelu"
    projector_bias: bool = True
    fusion: Fusion = field(default=NO_FUSION, metadata={"omit": True})
    family: str = field(default="llava", metadata={"omit": True})
    limits: Limits = field(default=Limits(), metadata={"omit": True})
    block: int = field(default=1, metadata={"omit": True})  # patches on a side of a visual token
    projector_norm: bool = field(default=False, metadata={"omit": True})
    projector_layers: int = field(default=2, metadata={"omit": True})
    canvas: tuple[int, int] | None = field(default=None, metadata={"omit": True})
    """Height and width that every image is brought to before all else; None: it is not."""

    def __post_init__(self) -> None:
        count("image_token_index", self.image_token_id, self.text.vocab - 1, least=0)
        if not isinstance(self.feature_layers, tuple) or not self.feature_layers:
            reject_value("vision_feature_layer", self.feature_layers, "a layer or a list of layers")
        depth = self.vision.layers
        for layer in self.feature_layers:
            count("vision_feature_layer", layer, depth, least=-depth - 1)
        self.fusion.check(depth)
        if len(self.fusion.injected) != len(self.text.inject):
            reject_value("fusion.injected", self.fusion.injected, "a state for each text.inject")
        word("vision_feature_select_strategy", self.select, ("default", "full"))
        word("projector_hidden_act", self.projector_activation, ACTIVATIONS)
        flag("multimodal_projector_bias", self.projector_bias)
        count("downsample_ratio", self.block, 8)
        count("projector_layers", self.projector_layers, 2)
        for edge in self.canvas or ():
            count("canvas", edge, _MOST_EDGE)
        flag("projector_norm", self.projector_norm)
        edge = self.vision.image_size // self.vision.patch_size
        divides("the block of downsample_ratio", self.block, "patches of a side", edge)
        if self.visual_tokens < 1:
            reject_value(
                "vision_config.patch_size", self.vision.patch_size, "more than one visual token"
            )

    @property
    def feature_states(self) -> tuple[int, ...]:
        """Hidden states of the vision encoder that are read, counted from 0, its embedding."""
        return tuple(index % (self.vision.layers + 1) for index in self.feature_layers)

    @property
    def feature_width(self) -> int:
        """Width of what the projector takes: means and states side by side."""
        states = len(self.fusion.means) + len(self.feature_layers)
        return self.vision.hidden * states * self.block**2

    @property
    def encoder_depth(self) -> int:
        """Layers of the vision encoder that run, up to the deepest state that is read."""
        return max((*self.feature_states, *self.fusion.states))

    @property
    def _family(self) -> Family:
        from .families.registry import FAMILIES  # families return what is defined here

        word("model_type", self.family, tuple(FAMILIES))
        return FAMILIES[self.family]

    @property
    def visual_tokens(self) -> int:
        """The most rows that an image has: what plans and slots are made for."""
        if self.canvas is not None:
            return self.layout(*self.canvas).rows
        return self._family.most_rows(self)

    def layout(self, height: int, width: int) -> ImageLayout:
        """Return what an image of so many pixels becomes."""
        if self.canvas is None:
            return self._family.layout(self, height, width)
        # The first of its resizes is to the canvas (``registry.with_canvas``).
        return replace(self._family.layout(self, *self.canvas), whole_of="resized")

    def within(self, limits: Limits) -> ModelConfig:
        """Return the same model with other limits of its images."""
        return replace(self, limits=limits)

    @property
    def has_class_row(self) -> bool:
        """True where the encoder has a class token that could stand for a visual token."""
        return self.vision.has_class_token and self.select == "default" and self.block == 1

    @property
    def least_tiles(self) -> int:
        """Tiles of the smallest image; where patches are tiles, those of a row."""
        return self.block**2 if self.vision.kind == PATCHES else 1

    @property
    def most_tiles(self) -> int:
        """Squares of the vision encoder's size that the largest image becomes, or patches."""
        if self.canvas is not None:
            return self.layout(*self.canvas).tiles
        if self.packs:  # a small copy of the whole is one more
            area = self.vision.image_size**2
            return 1 + max(high * wide for high, wide in self.limits.sizes) // area
        return self.tiles_of(self.visual_tokens)

    @property
    def windows(self) -> tuple[int, int, int]:
        """Fewest, usual and most windows of an image, where the encoder has any."""
        return self._family.windows(self) if self._family.windows else (1, 1, 1)

    def tiles_of(self, rows: int) -> int:
        """Return how many squares, or patches, make ``rows`` visual tokens."""
        return max(1, rows * self.block**2 // self._patches)

    def rows_of(self, tiles: int) -> int:
        """Return how many visual tokens so many squares, or patches, make."""
        return tiles * self._patches // self.block**2

    @property
    def _patches(self) -> int:
        return 1 if self.vision.kind == PATCHES else self.vision.patches

    @property
    def packs(self) -> bool:
        """True where rows of tiles are put in lines, which end in a row of their own."""
        return bool(self.limits.sizes)

    @property
    def shrinks(self) -> bool:
        """True where the lines of a large image are brought to fewer, shorter ones."""
        return self.packs and self.limits.most > 0

    @property
    def parted(self) -> bool:
        """True where an image's rows come in several runs, with markers between them."""
        side = self.vision.image_size
        return len(self.layout(4 * side, 4 * side).spans) > 1

    @property
    def varies(self) -> bool:
        """True where images may differ in their rows: the vision graph takes one at a time."""
        return self.limits != Limits()

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read a ``config.json`` of any family (``families.registry``)."""
        from .families.registry import read_config  # families return what is defined here

        return read_config(data)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form, which ``from_dict`` reads."""
        return to_json(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelConfig:
        """Read what ``to_dict`` returns, strictly.

        Raises:
            ModelError: an unknown or missing key, or a value the constructor refuses.
        """
        return from_json(cls, data, ModelError, REBUILD, "config")


# --- what is refused as a whole -------------------------------------------------------------------
