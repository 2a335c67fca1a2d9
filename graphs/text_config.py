"""The decoder of a checkpoint's ``config.json``: Llama's shape, whatever its name, as frozen data.

What differs between decoders is a flag of ``TextConfig``; which names have which is one table.
"""

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
    word,
)
from .errors import ModelError
from .fields import from_json, is_number, show, to_json

FULL, SLIDING = "full_attention", "sliding_attention"
REBUILD = "The file is damaged or from another visistage: build the bundle again."


@dataclass(frozen=True)
class Decoder:
    """Facts of a decoder that its ``model_type`` tells.

    Attributes:
        defaults: what transformers assumes for fields that config.json omits.
        qkv_bias: whether the q, k and v projections have one; None: as ``attention_bias`` says.
        output_bias: whether ``attention_bias`` holds for the o projection, too.
        mlp_bias: whether ``mlp_bias`` is read.
        qk_norm: whether queries and keys are normalised by head, before they turn.
        windows: of attention; ``asked``: only with ``use_sliding_window``.
        axes: how three positions share a head's frequencies, where a row has three.
    """

    defaults: Mapping[str, float]
    qkv_bias: bool | None = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: Literal["never", "asked", "always"] = "never"
    axes: Literal["", "chunked", "interleaved"] = ""


def _sizes(vocab: int, wide: int, positions: int, kv_heads: int = 0, **more: float) -> dict:
    sizes = {"vocab_size": vocab, "intermediate_size": wide, "max_position_embeddings": positions}
    return sizes | ({"num_key_value_heads": kv_heads} if kv_heads else {}) | more


_QWEN2_VL = Decoder(
    _sizes(
        152064, 29568, 32768, 8,
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, rms_norm_eps=1e-5,
        max_window_layers=80, rope_theta=1e6,
    ),
    qkv_bias=True, windows="asked", axes="chunked",
)  # fmt: skip
DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(_sizes(32000, 11008, 2048), qkv_bias=None, output_bias=True, mlp_bias=True),
    "mistral": Decoder(_sizes(32000, 14336, 131072, 8), windows="always"),
    "qwen2": Decoder(_sizes(151936, 22016, 32768, 32), qkv_bias=True, windows="asked"),
    "qwen3": Decoder(
        _sizes(151936, 22016, 32768, 32, head_dim=128),
        qkv_bias=None, output_bias=True, qk_norm=True, windows="asked",
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": Decoder(
        _sizes(151936, 22016, 128000, 32, head_dim=128, rope_theta=5e5),
        qkv_bias=None, output_bias=True, qk_norm=True, axes="interleaved",
    ),
}  # fmt: skip
"""Decoders by their ``model_type``."""

_LLAMA_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
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
AXES = 3
"""Positions of a row of a model with any but one: time, height, width."""

_SECTIONS = {"chunked": (16, 24, 24), "interleaved": (24, 20, 20)}  # where config.json has none
_THETA_AND_SHARE = ("rope_theta", "partial_rotary_factor")
_LENGTH_DEPENDENT = ("longrope", "su")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its type, its base and what else the type needs.

    ``parameters`` are (name, value) pairs in alphabetical order, ``rope_type`` among them and
    ``rope_theta`` not, as transformers 5 spells them. ``sections``: where a row has three positions
    (time, height, width), how many of a head's frequencies turn by each; ``interleaved``: in turn,
    instead of one after the other.
    """

    type: str = "default"
    theta: float = 10000.0
    parameters: tuple[tuple[str, Any], ...] = (("rope_type", "default"),)
    sections: tuple[int, ...] = field(default=(), metadata={"omit": True})
    interleaved: bool = field(default=False, metadata={"omit": True})

    def __post_init__(self) -> None:
        word("rope_type", self.type, tuple(_ROPES))
        if self.sections:
            if len(self.sections) != AXES:
                reject_value("rope_parameters.mrope_section", self.sections, f"{AXES} numbers")
            for size in self.sections:
                count("rope_parameters.mrope_section", size)
            time, *others = self.sections
            if self.interleaved and time < max(others):
                reject_value(
                    "rope_parameters.mrope_section", self.sections, "the first number largest"
                )
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

    @property
    def axes(self) -> int:
        """Positions of a row: 3, or 1 that all frequencies turn by."""
        return AXES if self.sections else 1

    @property
    def axis(self) -> tuple[int, ...]:
        """The position that each frequency turns by."""
        if not self.interleaved:
            return tuple(axis for axis, size in enumerate(self.sections) for _ in range(size))
        return tuple(
            at % AXES if at < AXES * self.sections[at % AXES] else 0
            for at in range(sum(self.sections))
        )

    @classmethod
    def from_hf(cls, text: Mapping[str, Any], max_positions: int, axes: str = "") -> Rope:
        """Read transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``).

        ``axes``: of ``Decoder``.
        """
        holder = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
        given = dict(mapping(holder, text.get(holder) or {}))
        old_name = given.pop("type", None)
        kind = given["rope_type"] = given.get("rope_type") or old_name or "default"
        if kind == "mrope":  # an older name
            kind = given["rope_type"] = "default"
        given.pop("mrope_interleaved", None)  # which transformers does not read: the class decides
        sections = given.pop("mrope_section", None) or _SECTIONS.get(axes)
        if axes and not isinstance(sections, list | tuple):
            reject_value(f"{holder}.mrope_section", sections, f"{AXES} numbers")
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
        sections = tuple(sections or ()) if axes else ()
        theta = number("rope_theta", 10000.0 if theta is None else theta)
        return cls(kind, theta, tuple(pairs), sections, axes == "interleaved")

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form, parameters as an object."""
        return {**to_json(self), "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """Read what ``to_dict`` returns. Raises ModelError."""
        given = dict(data)
        if isinstance(given.get("parameters"), Mapping):
            given["parameters"] = sorted(given["parameters"].items())
        return from_json(cls, given, ModelError, REBUILD, "config: text.rope")


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
    qk_norm: bool = field(default=False, metadata={"omit": True})
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
        for name in ("attention_bias", "output_bias", "mlp_bias", "qk_norm"):
            flag(name, getattr(self, name))
        word("hidden_act", self.activation, ("silu",))
        divides("num_key_value_heads", self.kv_heads, "num_attention_heads", self.heads)
        if self.head_dim % 2:
            reject_value("head_dim", self.head_dim, "an even number: rotary embedding turns pairs")
        if self.rope.sections and sum(self.rope.sections) != self.head_dim // 2:
            expected = f"a sum of {self.head_dim // 2}"
            reject_value("rope_parameters.mrope_section", self.rope.sections, expected)
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
                f"text_config.model_type is {show(family)}: this decoder is not supported, only "
                f"{', '.join(DECODERS)} are. Use a checkpoint on one of those."
            )
        decoder = DECODERS[family]
        known = {**_LLAMA_7B, **decoder.defaults, **given}
        hidden = count("hidden_size", known["hidden_size"])
        heads = count("num_attention_heads", known["num_attention_heads"])
        if "head_dim" not in known:
            divides("num_attention_heads", heads, "hidden_size", hidden)
        width = count("head_dim", known.get("head_dim", hidden // heads))
        positions = count("max_position_embeddings", known["max_position_embeddings"])
        _reject_windows(decoder, data, known, positions)
        if "num_key_value_heads" in data and data["num_key_value_heads"] is None:
            known["num_key_value_heads"] = heads
        biased = flag("attention_bias", known.get("attention_bias", False))
        activation = given.get("hidden_act", "silu")
        return cls(
            layers=known["num_hidden_layers"],
            hidden=hidden,
            intermediate=known["intermediate_size"],
            heads=heads,
            kv_heads=known.get("num_key_value_heads", heads),
            head_dim=width,
            vocab=known["vocab_size"],
            rms_eps=number("rms_norm_eps", known["rms_norm_eps"]),
            max_positions=positions,
            rope=Rope.from_hf(known, positions, decoder.axes),
            tied=given.get("tie_word_embeddings", False),
            attention_bias=biased if decoder.qkv_bias is None else decoder.qkv_bias,
            output_bias=biased and decoder.output_bias,
            mlp_bias=decoder.mlp_bias and flag("mlp_bias", given.get("mlp_bias", False)),
            activation="silu" if activation == "swish" else activation,
            qk_norm=decoder.qk_norm,
        )


def _reject_windows(
    decoder: Decoder, data: Mapping[str, Any], known: Mapping[str, Any], positions: int
) -> None:
    """Refuse windows that hide old rows from new ones: the chain has no such mask.

    A query sees ``window`` rows, itself among them, so one as long as the context hides none.
    """
    reads = decoder.windows == "always" or (
        decoder.windows == "asked" and data.get("use_sliding_window")
    )
    window = data.get("sliding_window", 4096) if reads else None
    kinds = data.get("layer_types")
    if decoder.windows == "asked" and kinds is None and window is not None:
        whole = known.get("max_window_layers", 28)
        whole = count("text_config.max_window_layers", whole, least=0)
        layers = count("num_hidden_layers", known["num_hidden_layers"], MAX_LAYERS)
        kinds = [SLIDING if layer >= whole else FULL for layer in range(layers)]
    known_kinds = (FULL,) if window is None else (FULL, SLIDING)
    if not isinstance(kinds or (), list | tuple) or not set(map(str, kinds or ())) <= set(
        known_kinds
    ):
        reject_value("text_config.layer_types", kinds, f"{' or '.join(known_kinds)} in every layer")
    slides = decoder.windows == "always" or SLIDING in (kinds or ())
    if window is not None and slides and count("text_config.sliding_window", window) < positions:
        reject_value(
            "text_config.sliding_window",
            window,
            f"null, or at least max_position_embeddings={positions}: sliding windows that hide "
            "rows are not supported",
        )
