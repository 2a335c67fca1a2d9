"""The image side of the chain in plain torch: encoder, entry and projector over given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..contract import injected_of
from ..modules.decoder import direct
from ..modules.encoders import make_vision
from ..modules.ops import Eager
from ..modules.vision import Projection
from ..plan.plan import StagePlan
from ..precision import NO_FALLBACK, Fp32Fallback
from ..selectors.entry import Entered
from ..vision_contract import projects_later, vision_readings, vision_spec
from .enter import choose_rows, encoded
from .executor import ANY_IMAGE, Encoded
from .torch_reference import load_weights


class TorchEncoder:
    """Pixels to the visual rows that enter stage 0.

    ``prepare`` changes modules before they are given their weights, as in ``TorchExecutor``.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: StagePlan,
        weights: Mapping[str, Tensor],
        fallback: Fp32Fallback = NO_FALLBACK,
        prepare: Callable[[nn.Module], None] = lambda module: None,
    ):
        self.config, self.plan = config, plan
        self.vision = make_vision(config, Eager(), fallback, vision_readings(config, plan))
        self.projection = (
            Projection(config, Eager(), fallback) if projects_later(config, plan) else None
        )
        for module in filter(None, (self.vision, self.projection)):
            prepare(module)
            load_weights(module, weights)

    @torch.no_grad()
    def __call__(
        self,
        pixels: Tensor,
        images: Sequence[str] = (ANY_IMAGE,),
        forced: Entered | None = None,
        feeds: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Encoded:
        """Return what enters of pixels, as the vision graph takes them, with its other ``feeds``.

        ``images``: digests of what they show; ``forced``: what enters instead of the selector's own
        choice, where it merges none.
        """
        more = [torch.from_numpy(value) for value in feeds.values()]
        outputs = self.vision.compose(direct, pixels, *more)
        chosen = chosen_rows(self.config, self.plan, outputs, images, forced)
        if self.projection is None:
            return chosen
        return chosen._replace(rows=self.projection(chosen.rows))


def chosen_rows(
    config: ModelConfig,
    plan: StagePlan,
    outputs: Sequence[Tensor],
    images: Sequence[str],
    forced: Entered | None = None,
) -> Encoded:
    """Return what enters of the encoder's outputs, not yet projected where that comes later.

    ``images``, ``forced``: as ``TorchEncoder`` takes them.
    """
    specs = vision_spec(config, plan, "float32").outputs
    named = {spec.name: value for spec, value in zip(specs, outputs, strict=True)}
    source = named["features" if projects_later(config, plan) else "visual_rows"]
    inject = injected_of(named)
    if plan.entry is None:
        return Encoded(source, np.tile(np.arange(source.shape[1]), (len(source), 1)), inject)
    chosen = [choose_rows(plan, named, image, at) for at, image in enumerate(images)]
    if forced is not None:
        chosen = [forced if own.features is None else own for own in chosen]
    rows = [
        source[at, torch.from_numpy(entered.source)]
        if entered.features is None
        else torch.from_numpy(entered.features).to(source.dtype)
        for at, entered in enumerate(chosen)
    ]
    at = torch.from_numpy(np.stack([entered.source for entered in chosen]))[..., None]
    taken = {layer: whole.take_along_dim(at, 1) for layer, whole in inject.items()}
    return encoded(torch.stack(rows), chosen, taken)
