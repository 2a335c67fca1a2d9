"""Features of more layers of an encoder, projected to what decoder layers add to visual rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import PromptError
from ..text_config import TextConfig
from .vision import activate

PROJECTOR = "mm_projectors"


def injected_rows(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    text: TextConfig,
    features: Sequence[Tensor] | None,
) -> dict[int, Tensor]:
    """Return (..., D) by decoder layer for ``features`` (..., h), one for each of ``text.inject``.

    Each goes through its own projector, whose weights are ``mm_projectors.K.linear_1.weight`` or,
    as released, ``model.mm_projectors.K.0.weight``, and so on.

    Raises:
        PromptError: another number of features than the model adds.
    """
    given = () if features is None else features
    if len(given) != len(text.inject):
        raise PromptError(
            f"features has {len(given)} tensors, this model adds {len(text.inject)}: give the "
            "encoder's features for each injected layer, in their order"
        )
    activation = config.get("projector_hidden_act", "gelu")
    return {
        layer: _linear(weights, number, 1, activate(activation, _linear(weights, number, 0, own)))
        for number, (layer, own) in enumerate(zip(text.inject, given, strict=True))
    }


def _linear(weights: Mapping[str, Tensor], number: int, place: int, x: Tensor) -> Tensor:
    names = (
        f"{PROJECTOR}.{number}.linear_{place + 1}",
        f"{PROJECTOR}.{number}.{2 * place}",
        f"model.{PROJECTOR}.{number}.{2 * place}",
    )
    name = next((name for name in names if f"{name}.weight" in weights), names[0])
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
