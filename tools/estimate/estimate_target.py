"""Targets of an estimate: a bundle, or a model by its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...compile.checkpoint.known_models import model_config
from ...compile.planfile import resolve_plan
from ...graphs.bundle import Bundle, bundles_in
from ...graphs.commands import visistage
from ...graphs.config import ModelConfig
from ...graphs.errors import TargetError
from ...graphs.families.family import Size
from ...graphs.families.registry import FAMILIES
from ...graphs.plan.call_cost import Sizes, head_work, vision_work
from ...graphs.plan.cost import PREFIX_ROWS, Geometry
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from ...graphs.quantization import parse_quant_config


@dataclass(frozen=True)
class EstimateTarget:
    """A model with a plan in a precision.

    prefix: rows before every image, held from the start; weight_bytes: None: from the sizes.

    Raises:
        TargetError: a precision that nothing is known of.
    """

    name: str
    config: ModelConfig
    plan: StagePlan
    precision: str
    prefix: int = PREFIX_ROWS
    weight_bytes: int | None = None

    def __post_init__(self) -> None:
        parse_quant_config(self.precision)

    @classmethod
    def of(cls, bundle: Bundle) -> EstimateTarget:
        """Take everything from a bundle."""
        manifest = bundle.manifest
        return cls(
            manifest.model,
            manifest.config,
            manifest.plan,
            manifest.precision,
            len(manifest.prefix.ids) if manifest.prefix else 0,
            manifest.weight_bytes,
        )

    @property
    def dense(self) -> EstimateTarget:
        """The same without pruning."""
        return replace(self, plan=preset("dense", self.plan.layers, self.plan.visual_tokens))

    def weights(self) -> float:
        """Return the bytes of all weights: a bundle's own, else what the sizes come to."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        geometry, sizes = Geometry.of(self.config.text), Sizes.of(self.precision)
        embedding = geometry.hidden * geometry.vocab * max(sizes.weight, 2.0)
        twice = sizes.one_row or 0.0  # for one row, beside those for many
        layers = (geometry.matmul_weights - geometry.head_weights) * (sizes.weight + twice)
        decoder = layers + head_work(geometry, sizes).weight_bytes
        return decoder + embedding + vision_work(self.config, sizes).weight_bytes


def estimate_target(
    name: str,
    plan: str | None,
    precision: str | None,
    prefix: int | None,
    image_tokens: int | None = None,
    canvas: Size | None = None,
) -> EstimateTarget:
    """Return the bundle at ``name``, or a model of that name with a plan.

    ``image_tokens``, ``canvas``: as ``model_config`` takes them.

    Raises:
        TargetError: an option that a bundle fixes itself.
        VisistageError: an unknown model, plan or precision.
    """
    path = Path(name)
    if bundles_in(path):
        bundle = Bundle.open(path)
        given = {
            "plan": plan,
            "precision": precision,
            "prefix": prefix,
            "image-tokens": image_tokens,
            "canvas": canvas and "{}x{}".format(*canvas),
        }
        for option, value in given.items():
            if value is not None:
                raise TargetError(
                    f"{bundle.path} has its own {option}; --{option} is for models by name. "
                    "Leave it out, or type: "
                    f"{visistage('estimate', bundle.manifest.model, **{option: value})}"
                )
        return EstimateTarget.of(bundle)
    config = model_config(name, image_tokens, canvas)
    staged = resolve_plan(
        plan or FAMILIES[config.family].plan, config.text.layers, config.visual_tokens
    )
    rows = PREFIX_ROWS if prefix is None else prefix
    return EstimateTarget(name, config, staged, precision or "fp16", rows)
