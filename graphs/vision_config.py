"""The vision side of a checkpoint's ``config.json``: an encoder of square images, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .config_fields import (
    MAX_LAYERS,
    count,
    divides,
    flag,
    mapping,
    number,
    reject_value,
    side,
    word,
)
from .errors import ModelError
from .fields import show

ENCODERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
PATCHES = "patches"
"""Kind of an encoder whose input is a sequence of patches."""

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "silu")
"""Activations of vision encoders and projectors; decoders have SiLU."""

DEFAULT_ENCODER = {  # what transformers builds where config.json has no vision_config at all
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder; sizes of images and patches are sides in pixels.

    ``internvit`` scales the updates of its layers. biased: its projections to queries, keys and
    values. rms: its norms, and with qk_norm those of whole queries and keys, take no means.

    ``patches`` takes pictures of any shape as a sequence of patches, squares of ``merge`` x
    ``merge`` of which become a row; its learned positions are those of ``image_size``, its kernel
    is over ``frames``, which are alike in a still picture. learned: it has such positions, and its
    kernel a bias. gated: its MLPs have three projections. window: side, in rows, of the windows
    that all layers but ``whole`` attend in; 0: none.
    final_norm: the last state is read behind one.
    """

    kind: Literal["clip", "siglip", "internvit", "patches"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    image_size: int
    patch_size: int
    channels: int = 3
    eps: float = 1e-5
    activation: str = "quick_gelu"
    biased: bool = field(default=True, metadata={"omit": True})
    rms: bool = field(default=False, metadata={"omit": True})
    qk_norm: bool = field(default=False, metadata={"omit": True})
    merge: int = field(default=1, metadata={"omit": True})
    frames: int = field(default=1, metadata={"omit": True})
    learned: bool = field(default=True, metadata={"omit": True})
    gated: bool = field(default=False, metadata={"omit": True})
    window: int = field(default=0, metadata={"omit": True})
    whole: tuple[int, ...] = field(default=(), metadata={"omit": True})
    final_norm: bool = field(default=False, metadata={"omit": True})

    def __post_init__(self) -> None:
        word("vision_config.kind", self.kind, (*ENCODERS.values(), "internvit", PATCHES))
        flag("vision_config.attention_bias", self.biased)
        flag("vision_config.norm_type", self.rms)
        flag("vision_config.use_qk_norm", self.qk_norm)
        flag("vision_config.final_norm", self.final_norm)
        count("vision_config.num_hidden_layers", self.layers, MAX_LAYERS)
        count("vision_config.hidden_size", self.hidden)
        count("vision_config.intermediate_size", self.intermediate)
        count("vision_config.num_attention_heads", self.heads)
        count("vision_config.image_size", self.image_size, 1 << 14)
        count("vision_config.patch_size", self.patch_size, self.image_size)
        count("vision_config.num_channels", self.channels, 16)
        count("vision_config.temporal_patch_size", self.frames, 16)
        flag("vision_config.learned", self.learned)
        flag("vision_config.gated", self.gated)
        count("vision_config.window_size", self.window, 1 << 10, least=0)
        for layer in self.whole:
            count("vision_config.fullatt_block_indexes", layer, self.layers - 1, least=0)
        if self.kind == PATCHES and self.merge != 2:
            reject_value("vision_config.spatial_merge_size", self.merge, "2, as published")
        number("vision_config.layer_norm_eps", self.eps)
        word("vision_config.hidden_act", self.activation, ACTIVATIONS)
        divides(
            "vision_config.num_attention_heads",
            self.heads,
            "vision_config.hidden_size",
            self.hidden,
        )

    @property
    def patches(self) -> int:
        """Patches of one image; what does not fill a patch at the border is cut (384 / 14)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Rows of a hidden state: the patches and, but for SigLIP, a class token; one where each
        patch comes by itself.
        """
        return 1 if self.kind == PATCHES else self.patches + self.has_class_token

    @property
    def window_patches(self) -> int:
        """Patches of a window."""
        return (self.window * self.merge) ** 2

    @property
    def has_class_token(self) -> bool:
        """True where a token of no patch comes first."""
        return self.kind not in ("siglip", PATCHES)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Read a ``clip_vision_model`` or ``siglip_vision_model`` config.

        Raises:
            ModelError: another encoder, or a malformed value; names the field.
        """
        given = {k: v for k, v in mapping("vision_config", data).items() if v is not None}
        family = given.get("model_type", "clip_vision_model")
        if not isinstance(family, str) or family not in ENCODERS:
            raise ModelError(
                f"vision_config.model_type is {show(family)}: this encoder is not supported, "
                f"only "
                f"{' and '.join(ENCODERS)} are. Use a LLaVA checkpoint with one of those."
            )
        clip = family == "clip_vision_model"
        return cls(
            kind="clip" if clip else "siglip",
            layers=given.get("num_hidden_layers", 12),
            hidden=given.get("hidden_size", 768),
            intermediate=given.get("intermediate_size", 3072),
            heads=given.get("num_attention_heads", 12),
            image_size=side("image_size", given.get("image_size", 224)),
            patch_size=side("patch_size", given.get("patch_size", 32 if clip else 16)),
            channels=given.get("num_channels", 3),
            eps=number(
                "vision_config.layer_norm_eps", given.get("layer_norm_eps", 1e-5 if clip else 1e-6)
            ),
            activation=given.get("hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh"),
        )
