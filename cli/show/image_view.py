"""Costs of images by their size: the plan's savings beside those of a budget of tokens.

FLOPs of what a first question pays for an image: the vision encoder, and its rows in the decoder.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ...compile.checkpoint.known_models import model_config
from ...graphs.config import ModelConfig
from ...graphs.families.family import Size
from ...graphs.plan.call_cost import COUNTS, vision_work
from ...graphs.plan.cost import Geometry, Load, cost_of, loads_as_run
from ...graphs.plan.plan import StagePlan

SIZES = ((336, 336), (480, 640), (1080, 1920))
"""Height and width of the images that are shown."""


def image_facts(
    model: str, plan: StagePlan, image_tokens: int | None, canvas: Size | None = None
) -> list[dict[str, Any]]:
    """Return the costs of images of some sizes; none where all have the same tokens.

    ``canvas``: height and width that all are brought to.

    Shares are of an unpruned image without the budget: what the budget saves, what the plan saves
    of what that leaves, and the encoder's part, which no plan touches.
    """
    whole, capped = model_config(model), model_config(model, image_tokens, canvas)
    if not whole.varies:
        return []
    geometry, out = Geometry.of(whole.text), []
    for height, width in SIZES if canvas is None else (canvas,):
        before, after = whole.layout(height, width), capped.layout(height, width)
        dense, encoder = (
            _decoder_flops(before.rows, None, geometry),
            _encoder_flops(whole, height, width),
        )
        left, encoded = (
            _decoder_flops(after.rows, None, geometry),
            _encoder_flops(capped, height, width),
        )
        pruned = _decoder_flops(after.rows, plan, geometry)
        full = dense + encoder
        out.append(
            {
                "canvas": canvas,
                "height": height,
                "width": width,
                "tokens": after.rows,
                "tokens_unlimited": before.rows,
                "encoder_flops": encoded,
                "decoder_flops": left,
                "pruned_decoder_flops": pruned,
                "budget_saves_percent": 100 * (full - left - encoded) / full,
                "plan_saves_percent": 100 * (left - pruned) / full,
                "encoder_percent": 100 * encoded / (encoded + pruned),
            }
        )
    return out


def image_table(facts: list[dict[str, Any]]) -> Table:
    """Tabulate ``image_facts``."""
    table = Table(
        *("image", "tokens", "encoder", "its rows in the decoder", "under the plan"),
        *("budget saves", "plan saves", "left: encoder"),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for fact in facts:
        unlimited = fact["tokens_unlimited"]
        few = "" if unlimited == fact["tokens"] else f" of {unlimited}"
        table.add_row(
            f"{fact['width']}x{fact['height']}" + (" on the canvas" if fact["canvas"] else ""),
            f"{fact['tokens']}{few}",
            *(
                f"{fact[name] / 1e12:.2f} TFLOP"
                for name in ("encoder_flops", "decoder_flops", "pruned_decoder_flops")
            ),
            *(
                f"{fact[name]:.0f} %"
                for name in ("budget_saves_percent", "plan_saves_percent", "encoder_percent")
            ),
        )
    return table


def _encoder_flops(config: ModelConfig, height: int, width: int) -> float:
    return vision_work(config, COUNTS, layout=config.layout(height, width)).flops


def _decoder_flops(rows: int, plan: StagePlan | None, geometry: Geometry) -> float:
    """Return the FLOPs of an image's rows in the prefill, under a plan or unpruned."""
    if plan is None:
        return 2 * cost_of([Load("dense", rows)] * geometry.layers, geometry).visual_macs
    counts = [min(rows, stage.visual_tokens) for stage in plan.stages for _ in range(stage.depth)]
    return 2 * cost_of(loads_as_run(plan, counts), geometry).visual_macs
