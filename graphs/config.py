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
    MAX_LAYERS,
    count,
    divides,
    flag,
    mapping,
    number,
    reject_value,
    word,
)
from .errors import ModelError
from .fields import from_json, is_number, show, to_json
from .fusion import NO_FUSION, Fusion
from .vision_config import ACTIVATIONS, VisionConfig

if TYPE_CHECKING:
    from .families.family import Family, ImageLayout

_MOST_PIXELS = 1 << 30
FULL, SLIDING = "full_attention", "sliding_attention"
_REBUILD = "The file is damaged or from another visistage: build the bundle again."

# What transformers assumes for a field that config.json omits, where families differ.
DECODERS: dict[str, dict[str, int]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
}
_ROPES = {  # rope_type: the numbers it cannot do without
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_THETA_AND_SHARE = ("rope_theta", "partial_rotary_factor")
_LENGTH_DEPENDENT = ("longrope", "su")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its type, its base and what else the type needs.

    ``parameters`` are (name, value) pairs in alphabetical order, ``rope_type`` among them and
    ``rope_theta`` not, as transformers 5 spells them.
    """

    type: str = "default"
    theta: float = 10000.0
    parameters: tuple[tuple[str, Any], ...] = (("rope_type", "default"),)

    def __post_init__(self) -> None:
        word("rope_type", self.type, tuple(_ROPES))
        number("rope_theta", self.theta)
        given = dict(self.parameters)
        if given.get("rope_type") != self.type:
            reject_value("rope_parameters.rope_type", given.get("rope_type"), repr(self.type))
        for name, value in given.items():
            if name != "rope_type" and not (isinstance(value, bool) or is_number(value)):
                reject_value(f"rope_parameters.{name}", value, "a number or true/false")
        for name in _ROPES[self.type]:
            number(f"rope_parameters.{name}", given.get(name))
        if self.type == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
            reject_value(
                "rope_parameters.low_freq_factor", given["low_freq_factor"], "< high_freq_factor"
            )

    @classmethod
    def from_hf(cls, text: Mapping[str, Any], max_positions: int) -> Rope:
        """Read transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``)."""
        holder = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
        given = dict(mapping(holder, text.get(holder) or {}))
        old_name = given.pop("type", None)
        kind = given["rope_type"] = given.get("rope_type") or old_name or "default"
        if kind == "dynamic":
            # It changes the base for sequences beyond max_position_embeddings, and none get there.
            number(f"{holder}.factor", given.get("factor"))
            kind = "default"
            given = {"rope_type": kind} | {k: v for k, v in given.items() if k in _THETA_AND_SHARE}
        if kind in _LENGTH_DEPENDENT:
            raise ModelError(
                f"{holder}: rope type {kind!r} changes the angles of all positions with the length "
                "of the sequence, so keys in a cache would become wrong. Supported are "
                f"{', '.join(_ROPES)}. Use a checkpoint with one of those."
            )
        theta = given.pop("rope_theta", None)
        theta = text.get("rope_theta") if theta is None else theta
        partial = given.pop("partial_rotary_factor", None) or text.get("partial_rotary_factor")
        if partial not in (None, 1):
            reject_value(f"{holder}.partial_rotary_factor", partial, "1: whole heads turn")
        if kind in ("llama3", "yarn"):
            given.setdefault("original_max_position_embeddings", max_positions)
        pairs = sorted((name, value) for name, value in given.items() if value is not None)
        return cls(kind, number("rope_theta", 10000.0 if theta is None else theta), tuple(pairs))

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form, parameters as an object."""
        return {**to_json(self), "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """Read what ``to_dict`` returns. Raises ModelError."""
        given = dict(data)
        if isinstance(given.get("parameters"), Mapping):
            given["parameters"] = sorted(given["parameters"].items())
        return from_json(cls, given, ModelError, _REBUILD, "config: text.rope")


@dataclass(frozen=True)
class TextConfig:
    """A Llama-shaped decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_eps: float
    max_positions: int
    rope: Rope
    tied: bool = False  # the head is the embedding; a head in the file counts all the same
    attention_bias: bool = False  # of the q, k and v projections
    output_bias: bool = False  # of the o projection (llama with attention_bias; never qwen2)
    mlp_bias: bool = False
    activation: str = "silu"
    # Layers at whose input rows of features are added to the visual rows. Not in the repr, by
    # which traces are named: graphs without it keep their bytes.
    inject: tuple[int, ...] = field(default=(), repr=False, metadata={"omit": True})

    def __post_init__(self) -> None:
        count("num_hidden_layers", self.layers, MAX_LAYERS)
        count("hidden_size", self.hidden)
        count("intermediate_size", self.intermediate)
        count("num_attention_heads", self.heads)
        count("num_key_value_heads", self.kv_heads)
        count("head_dim", self.head_dim)
        count("vocab_size", self.vocab)
        count("max_position_embeddings", self.max_positions)
        number("rms_norm_eps", self.rms_eps)
        flag("tie_word_embeddings", self.tied)
        for name in ("attention_bias", "output_bias", "mlp_bias"):
            flag(name, getattr(self, name))
        word("hidden_act", self.activation, ("silu",))
        divides("num_attention_heads", self.heads, "hidden_size", self.hidden)
        divides("num_key_value_heads", self.kv_heads, "num_attention_heads", self.heads)
        if self.head_dim % 2:
            reject_value("head_dim", self.head_dim, "an even number: rotary embedding turns pairs")
        if sorted({*self.inject}) != [*self.inject]:
            reject_value("text.inject", self.inject, "ascending layers")
        for layer in self.inject:
            count("text.inject", layer, self.layers - 1, least=0)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> TextConfig:
        """Read the config of a ``LlamaForCausalLM``-like model; a missing family is llama.

        Raises:
            ModelError: an unsupported family or feature, or a malformed value; names the field.
        """
        given = {k: v for k, v in mapping("text_config", data).items() if v is not None}
        family = given.get("model_type", "llama")
        if not isinstance(family, str) or family not in DECODERS:
            raise ModelError(
                f"text_config.model_type is {show(family)}: this decoder is not supported, "
                f"only "
                f"{', '.join(DECODERS)} are. Use a LLaVA checkpoint on one of those."
            )
        known = {**DECODERS[family], **given}
        hidden = count("hidden_size", known.get("hidden_size", 4096))
        heads = count("num_attention_heads", known.get("num_attention_heads", 32))
        divides("num_attention_heads", heads, "hidden_size", hidden)
        positions = count("max_position_embeddings", known["max_position_embeddings"])
        _reject_windows(family, data, positions)
        if "num_key_value_heads" in data and data["num_key_value_heads"] is None:
            known["num_key_value_heads"] = heads
        biased = family == "llama" and flag("attention_bias", given.get("attention_bias", False))
        activation = given.get("hidden_act", "silu")
        return cls(
            layers=given.get("num_hidden_layers", 32),
            hidden=hidden,
            intermediate=known["intermediate_size"],
            heads=heads,
            kv_heads=known.get("num_key_value_heads", heads),
            head_dim=given.get("head_dim", hidden // heads),
            vocab=known["vocab_size"],
            rms_eps=number("rms_norm_eps", given.get("rms_norm_eps", 1e-6)),
            max_positions=positions,
            rope=Rope.from_hf(given, positions),
            tied=given.get("tie_word_embeddings", False),
            attention_bias=biased or family == "qwen2",
            output_bias=biased,
            mlp_bias=family == "llama" and flag("mlp_bias", given.get("mlp_bias", False)),
            activation="silu" if activation == "swish" else activation,
        )


@dataclass(frozen=True)
class Limits:
    """Limits of what an image becomes, as its processor has them; a family says of what.

    least, most: tiles, or pixels. sizes: (height, width) that one is chosen of.
    """

    least: int = 0
    most: int = 0
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        count("limits.most", self.most, _MOST_PIXELS, least=0)
        count("limits.least", self.least, self.most, least=0)
        for size in self.sizes:
            for edge in size:
                count("limits.sizes", edge, 1 << 14)


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
        return self.vision.hidden * (len(self.fusion.means) + len(self.feature_layers))

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
        return self._family.most_rows(self)

    def layout(self, height: int, width: int) -> ImageLayout:
        """Return what an image of so many pixels becomes."""
        return self._family.layout(self, height, width)

    def within(self, limits: Limits) -> ModelConfig:
        """Return the same model with other limits of its images."""
        return replace(self, limits=limits)

    @property
    def has_class_row(self) -> bool:
        """True where the encoder has a class token, which becomes no visual token."""
        return self.vision.kind == "clip" and self.select == "default"

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
        return from_json(cls, data, ModelError, _REBUILD, "config")


# --- what is refused as a whole -------------------------------------------------------------------


def _reject_windows(family: str, data: Mapping[str, Any], positions: int) -> None:
    """Refuse windows that hide old rows from new ones: the chain has no such mask.

    A query sees ``window`` rows, itself among them, so one as long as the context hides none.
    """
    window = data.get("sliding_window", 4096) if family != "llama" else None  # not read there
    if family == "qwen2" and not data.get("use_sliding_window"):
        window = None
    kinds = data.get("layer_types")
    if family == "qwen2" and kinds is None and window is not None:
        whole = count("text_config.max_window_layers", data.get("max_window_layers", 28), least=0)
        layers = count("num_hidden_layers", data.get("num_hidden_layers") or 32, MAX_LAYERS)
        kinds = [SLIDING if layer >= whole else FULL for layer in range(layers)]
    known = (FULL,) if window is None else (FULL, SLIDING)
    if not isinstance(kinds or (), list | tuple) or not set(map(str, kinds or ())) <= set(known):
        reject_value("text_config.layer_types", kinds, f"{' or '.join(known)} in every layer")
    slides = family == "mistral" or SLIDING in (kinds or ())
    if window is not None and slides and count("text_config.sliding_window", window) < positions:
        reject_value(
            "text_config.sliding_window",
            window,
            f"null, or at least max_position_embeddings={positions}: sliding windows that hide "
            "rows are not supported",
        )
