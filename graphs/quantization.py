"""The integers of a bundle: weights, inputs of linear layers, caches. Pure data.

    int8                              W8A8 everywhere, the head W8
    int8:vision=float,stage2=w4       the vision encoder in float, the last of three stages W4
    int8:decode=w4                    W8A8 where many rows pass, W4 for one row and the head
    w4:keep=5%                        weights alone; the most sensitive 5 % stay float
    fp16:cache=int8                   float layers over an INT8 cache; so int8:cache=int8, ...

A *recipe* is what a user writes as precision; a ``Quantization`` is what came of it for one model
and plan: a scheme for every linear layer that is not float. The manifest holds both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import TargetError, nearest
from .fields import check_word, split_options
from .linears import Group
from .plan.plan import StagePlan

Scheme = Literal["float", "w8a8", "w8", "w4"]
"""The arithmetic of one linear layer.

    float  in the type of the graph
    w8a8   INT8 inputs and weights: one static scale for the inputs, one per output channel
    w8     INT8 weights, one scale per output channel, in ONNX Runtime also per ``SCALE_BLOCK``
    inputs; inputs in float
    w4     INT4 weights, one scale per output channel and ``block_of`` inputs; inputs in float

All symmetric: engines take no zero points.
"""

Observer = Literal["minmax", "percentile", "entropy", "mse"]
"""The rule by which a range of inputs becomes one scale."""

CacheScheme = Literal["float", "int8"]
"""The form of cached keys and values: in the type of the graph, or as symmetric INT8 with one
static scale for each layer and head, keys and values apart."""

SCHEMES: tuple[str, ...] = get_args(Scheme)
CACHES: tuple[str, ...] = get_args(CacheScheme)
OBSERVERS: tuple[str, ...] = get_args(Observer)
QUANTISED = ("int8", "w8", "w4")
"""Precisions that quantise."""

FLOAT_PRECISIONS = ("fp32", "fp16")
"""Precisions that do not, unless options say so."""

SCALE_BLOCK = 128
"""Inputs that share one scale of an output channel where weights alone are rounded."""

_WHOLE_BLOCKS = (SCALE_BLOCK, 64, *range(SCALE_BLOCK - 1, 15, -1))
"""Blocks for a layer of an engine, the best ones first."""

_WORDS = {
    "vision": SCHEMES,
    "head": SCHEMES,
    "cache": CACHES,
    "decode": ("w4",),
    "observer": OBSERVERS,
    "smooth": ("yes", "no"),
}
_OPTIONS = (
    "vision", "head", "stage0", "stage1", "...", "cache", "decode", "observer", "smooth", "keep",
)  # fmt: skip


def block_of(scheme: Scheme, inputs: int, *, engines: bool) -> int | None:
    """Return how many of a layer's ``inputs`` share a scale of an output channel; None: all.

    INT8 weights alone: ONNX Runtime is fastest with blocks, while TensorRT-RTX was seen to store
    weights in blocks as FP16, twice as large.

    Of INT4, TensorRT takes whole blocks only, and counts scales rather than read the block's size:
    960 inputs with 8 scales, the last of them of 64, it would read as blocks of 120.
    """
    if scheme == "w4" and engines:
        return next((size for size in _WHOLE_BLOCKS if inputs % size == 0), inputs)
    return SCALE_BLOCK if scheme == "w4" or (scheme == "w8" and not engines) else None


@dataclass(frozen=True)
class QuantConfig:
    """A quantised precision as a user wrote it.

    Attributes:
        base: ``int8``, ``w8`` or ``w4``; or ``fp32`` or ``fp16``, of which every layer stays float
            that nothing else is said of.
        vision, head: scheme of encoder and projector, and of the head; None: what suits base and
            target.
        stages: schemes of single stages; the others take the base's.
        cache: type of cached keys and values.
        decode: scheme of W8A8 layers of the decoder in calls of one row, for which they have other
            weights beside their own; None: the same. The head, of one row always, takes it, too.
        observer: None: the one that the calibration found best.
        smooth: whether ranges are smoothed where the calibration found that to help.
        keep: share of the linear layers that stay float, the most sensitive ones.
        keep_names: linear layers that stay float.
    """

    base: str
    vision: Scheme | None = None
    head: Scheme | None = None
    stages: Mapping[int, Scheme] = field(default_factory=dict)
    cache: CacheScheme = "float"
    decode: Scheme | None = None
    observer: Observer | None = None
    smooth: bool = True
    keep: float = 0.0
    keep_names: tuple[str, ...] = ()

    @property
    def scheme(self) -> Scheme:
        """Scheme of every decoder layer for which no other is given."""
        if self.base in FLOAT_PRECISIONS:
            return "float"
        return "w8a8" if self.base == "int8" else self.base  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """Text for a bundle's folder: the precision, and the options that are not the default."""
        parts = [self.base]
        if self.vision is not None:
            parts.append(f"vision={self.vision}")
        if self.head is not None:
            parts.append(f"head={self.head}")
        parts += [f"stage{stage}={scheme}" for stage, scheme in sorted(self.stages.items())]
        if self.cache != "float":
            parts.append(f"cache={self.cache}")
        if self.decode is not None:
            parts.append(f"decode={self.decode}")
        if self.observer is not None:
            parts.append(f"observer={self.observer}")
        if not self.smooth:
            parts.append("smooth=no")
        if self.keep:
            parts.append(f"keep={100 * self.keep:g}")
        parts += [f"keep={name}" for name in self.keep_names]
        return "+".join(parts)

    def scheme_of(self, group: Group, plan: StagePlan, runs: Sequence[str]) -> Scheme:
        """Return the scheme of a group's layers before any is kept float; ``runs``: the target's.

        The encoder is run once an image and has many rows: only rounded inputs make it faster. The
        head is run for one row: its weights are all that counts.
        """
        if group.place == "vision":
            return self.vision or ("w8a8" if self.base == "int8" else "float")
        if group.place == "head" and self.base not in FLOAT_PRECISIONS:
            weights: Scheme = self.decode or ("w4" if self.base == "w4" else "w8")
            return self.head or (weights if weights in runs else "float")
        if group.place == "head":
            return self.head or "float"
        assert group.layer is not None
        index = next(i for i, stage in enumerate(plan.stages) if group.layer < stage.layers[1])
        return self.stages.get(index, self.scheme)

    @property
    def asked(self) -> set[str]:
        """Every scheme that the user named, or that the base stands for."""
        named = {self.scheme, self.vision, self.head, self.decode, *self.stages.values()}
        return {scheme for scheme in named if scheme}


def is_quantised(precision: str) -> bool:
    """Return whether a precision quantises, or is a float one with options."""
    base = base_of(precision)
    return base in QUANTISED or (base in FLOAT_PRECISIONS and base != precision)


def base_of(precision: str) -> str:
    """Return a precision without its options: ``int8`` of ``int8:vision=float``."""
    return re.split("[:+]", precision, maxsplit=1)[0]


def parse_quant_config(text: str) -> QuantConfig:
    """Read ``base[:option=value,...]``, or a ``QuantConfig.name``, as folders carry it.

    Raises:
        TargetError: naming what is wrong and what to write.
    """
    remedy = f"Known options: {', '.join(_OPTIONS)}."
    text = re.sub("[:+]", ":", text, count=1).replace("+", ",")
    base, pairs = split_options(text, TargetError, remedy, repeatable=("keep",))
    if base not in (*QUANTISED, *FLOAT_PRECISIONS):
        known = ", ".join((*QUANTISED, *FLOAT_PRECISIONS))
        raise TargetError(f"unknown precision '{base}'. Known: {known}")
    words: dict[str, Any] = {}
    stages: dict[int, Scheme] = {}
    share, names = 0.0, []
    for key, value in pairs:
        stage = re.fullmatch(r"stage(\d+)", key)
        if key == "keep":
            percent = re.fullmatch(r"(?:auto:)?(\d+(?:\.\d+)?)%?", value)
            if percent is None:
                names.append(value)
            else:
                share = float(percent[1]) / 100
            continue
        known_words = SCHEMES if stage else _WORDS.get(key)
        if known_words is None:
            hint = nearest(key, _OPTIONS)
            raise TargetError(f"unknown option '{key}' of precision '{base}'.{hint} {remedy}")
        check_word(f"{base}: {key}", value, known_words, TargetError, remedy)
        if stage:
            stages[int(stage[1])] = value  # type: ignore[assignment]
        else:
            words[key] = value
    if share > 1:
        raise TargetError(
            f"keep={100 * share:g}% is more than 100 %. Write a share such as keep=5%"
        )
    words["smooth"] = words.get("smooth") != "no"
    return QuantConfig(base, **words, stages=stages, keep=share, keep_names=tuple(names))


@dataclass(frozen=True)
class Quantization:
    """Result of a ``QuantConfig`` for one model and plan.

    Attributes:
        recipe: the ``QuantConfig`` as the user wrote it.
        calibration: hash of the calibration it rests on; None where it needs none.
        observer: the one used; None where inputs stay float.
        schemes: of every linear layer that is not float, by the checkpoint's name.
        decode: the same in calls of one row, where these have graphs of their own; else empty.
        smoothed: groups whose inputs were smoothed, by name, with alpha.
        cache: type of cached keys and values.
    """

    recipe: str = ""
    calibration: str | None = None
    observer: str | None = None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    decode: Mapping[str, Scheme] = field(default_factory=dict, metadata={"omit": True})
    smoothed: Mapping[str, float] = field(default_factory=dict)
    cache: CacheScheme = "float"

    @property
    def quantises(self) -> bool:
        """True where weights, inputs or caches are not float."""
        return bool(self.schemes) or self.quantises_cache

    @property
    def quantises_cache(self) -> bool:
        """True where keys and values are cached as integers."""
        return self.cache == "int8"


FLOAT = Quantization()
"""Every linear layer and every cache in the type of its graph."""
