"""What is estimated: a bundle, or a model by its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...graphs.bundle import Bundle
from ...graphs.config import ModelConfig
from ...graphs.errors import TargetError
from ...graphs.plan.call_cost import WEIGHT_BYTES, Sizes, vision_work
from ...graphs.plan.cost import Geometry
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset

PREFIX_ROWS = 35
"""LLaVA-1.5's: BOS, system prompt, ``USER: ``. Of a bundle the number is known."""


@dataclass(frozen=True)
class EstimateTarget:
    """A model with a plan in a precision.

    prefix: rows before every picture, held from the start; weight_bytes: None: from the sizes.

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
        base = self.precision.partition(":")[0].partition("+")[0]
        if base not in WEIGHT_BYTES:
            raise TargetError(
                f"unknown precision '{self.precision}'. Known: {', '.join(WEIGHT_BYTES)}"
            )

    @classmethod
    def of(cls, bundle: Bundle) -> EstimateTarget:
        """A bundle's."""
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
        plan = preset("dense", self.plan.layers, self.plan.visual_tokens)
        return replace(self, plan=plan)

    def weights(self) -> float:
        """Bytes of all weights: of a bundle those it has, else decoder, embedding and tower."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        geometry, sizes = Geometry.of(self.config.text), Sizes.of(self.precision)
        embedding = geometry.hidden * geometry.vocab * max(sizes.weight, 2.0)
        decoder = geometry.matmul_weights * sizes.weight
        return decoder + embedding + vision_work(self.config, sizes).weight_bytes
