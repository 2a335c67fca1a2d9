"""LLaVA-OneVision: LLaVA-NeXT's lines of tokens, over SigLIP, of many more sizes. What is larger
than nine tiles is shrunk behind the encoder, so that details are seen but not all are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from ..config import ModelConfig
from ..config_fields import mapping, reject_value
from . import llava, llava_next
from .family import Family

_EDGES = tuple(384 * tiles for tiles in range(1, 7))
_SHRUNK = re.compile(r"anyres_max_([1-9]\d{0,3})")
_SO400M = {  # what transformers builds where config.json has no vision_config at all
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}


def read(data: Mapping[str, Any]) -> ModelConfig:
    """Read the ``config.json`` of a ``LlavaOnevisionForConditionalGeneration``.

    Raises:
        ModelError: an unsupported part, or a malformed value.
    """
    given = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": list(product(_EDGES, _EDGES)),
        **{k: v for k, v in data.items() if v is not None},
    }
    text = mapping("text_config", given.get("text_config", {}))
    vision = mapping("vision_config", given.get("vision_config", _SO400M))
    config = llava.read(
        {
            **given,
            "text_config": {"model_type": "qwen2", **text},
            "vision_config": {"model_type": "siglip_vision_model", **vision},
            "image_token_index": llava.image_token(given, 151646),
            "image_token_id": None,
        }
    )
    if config.select != "full" or config.vision.kind != "siglip":
        reject_value("vision_feature_select_strategy", config.select, "full, with SigLIP")
    ratio = given["vision_aspect_ratio"]
    tiles = _SHRUNK.fullmatch(ratio) if isinstance(ratio, str) else None
    if tiles is None:
        reject_value("vision_aspect_ratio", ratio, "anyres_max_ and a number of tiles")
    sizes = llava_next.read_sizes(given["image_grid_pinpoints"], config.vision.image_size)
    return replace(config, family="llava_onevision", limits=replace(sizes, most=int(tiles[1])))


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    read=read,
    layout=llava_next.layout,
    most_rows=llava_next.most_rows,
    prefixes=llava_next.LLAVA_NEXT.prefixes,
    budgeted=llava_next.budgeted,
)
