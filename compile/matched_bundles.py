"""Bundles of one model whose plans cost the same: what ``visistage compare`` puts side by side.

comparisons/demo/dense-fp32-cpu/              the unpruned model
comparisons/demo/fastv-k3-r0.78-fp32-cpu/     and a plan of each method at each share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..graphs.bundle import Bundle
from ..graphs.errors import ModelError, PlanError
from ..graphs.plan.cost import Geometry
from ..graphs.presets.matching import flops_share, is_control, is_scaled, matched_plan, methods
from ..graphs.progress import Progress
from .checkpoint.known_models import model_config
from .known_builds import known_build, note_build, request_key
from .planfile import resolve_plan

STOCK, TRAINED = "stock", "trained for it"
"""Weights of a plan: the model's own, or those of a checkpoint trained for the plan's method."""

SHARES = (0.25, 0.5, 0.75)
"""Shares of the dense plan's visual FLOPs at which methods are compared."""

FAR = 0.05
"""A plan that misses its share by more is not compared with others at that share."""

DENSE = "dense"


@dataclass(frozen=True)
class ComparedPlan:
    """A bundle to compare.

    method: as the user names it; plan: as ``resolve_plan`` takes it; target: the share of visual
    FLOPs it was brought to, None where the plan was given; share: that of its plan, None where each
    prompt decides; control: whether it is there to be beaten; weights: ``STOCK`` or ``TRAINED``.
    """

    method: str
    plan: str
    target: float | None
    share: float | None
    control: bool
    bundle: Bundle
    weights: str = STOCK


def matched_bundles(
    model: str,
    plans: Sequence[str] = (),
    shares: Sequence[float] = SHARES,
    *,
    out: str | Path,
    progress: Progress,
    trained: Sequence[tuple[str, str]] = (),
    **origin: object,
) -> tuple[list[ComparedPlan], list[str]]:
    """Build the dense bundle and one of each method at each share; those that are there stay.

    Args:
        model: as ``make_bundle`` takes it.
        plans: names of presets, and ``NAME:entry=SELECTOR``, are brought to each share; other plans
            are compared as they are. None: all of ``methods()``.
        shares: above 0, up to 1.
        out: folder of all comparisons.
        progress: sees a step for every bundle.
        trained: plans, each with the folder of a checkpoint of the same shape that was trained for
            it; the plan is compared with the model's own weights, too, where these can run it.
        origin: further arguments of ``make_bundle``: what the checkpoint is.

    Returns:
        The plans, dense first, then by share; and a sentence on each that was left out.

    Raises:
        VisistageError: what the user can correct.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise PlanError(
                f"found the share {share:g}, expected one above 0, up to 1. Type --share 25%"
            )

    def built(text: str, checkpoint: str = model) -> Bundle:
        with progress.step(f"build {text}") as outcome:
            request = {"model": checkpoint, "plan": text, "target": "cpu", **origin}
            key = request_key(request)
            bundle = known_build(Path(out), key)
            if bundle is not None:
                outcome.append("built before")
                return bundle
            from .build import make_bundle  # takes seconds

            # Hard links: weights that are used as they are lie there once for all plans.
            bundle = make_bundle(checkpoint, plan=text, out=out, weights="link", **origin)  # type: ignore[arg-type]
            note_build(Path(out), key, bundle)
            return bundle

    try:  # before minutes of building: a wrong plan shows at once
        config = model_config(model)
    except ModelError:
        config = built(DENSE).manifest.config
    geometry, tokens = Geometry.of(config.text), config.visual_tokens
    scaled = [name for name in plans or methods() if is_scaled(name)]
    wanted: list[tuple[str, str, float | None, float | None]] = []
    left_out = []

    def own_share(text: str) -> float | None:
        plan = resolve_plan(text, geometry.layers, tokens)
        return None if plan.probe else flops_share(plan, geometry)

    for name in dict.fromkeys(plans):
        if name not in scaled and name != DENSE:
            wanted.append((name, name, None, own_share(name)))
    fitting = [(text, folder, own_share(text)) for text, folder in trained]
    for target in sorted(set(shares)):
        for name in dict.fromkeys(scaled):
            try:
                found = matched_plan(name, target, geometry, tokens)
            except PlanError as error:
                left_out.append(f"{name} at {100 * target:g} %: {error}")
                continue
            if abs(found.share - target) > FAR:
                left_out.append(
                    f"{name} at {100 * target:g} % of the visual FLOPs: its nearest plan, "
                    f"{found.text}, has {100 * found.share:.1f} %"
                )
                continue
            wanted.append((name, found.text, target, found.share))
    rows = [ComparedPlan(DENSE, DENSE, None, 1.0, False, built(DENSE))]
    rows += [
        ComparedPlan(method, text, target, share, is_control(method), built(text))
        for method, text, target, share in wanted
    ]
    for text, folder, own in fitting:
        if all(row.plan != text for row in rows):
            try:
                rows.append(ComparedPlan(text, text, None, own, False, built(text)))
            except ModelError as error:
                left_out.append(f"{text}, {STOCK} weights: {error}")
        method, bundle = f"{text}, {TRAINED}", built(text, folder)
        rows.append(ComparedPlan(method, text, None, own, False, bundle, TRAINED))
    return rows, left_out
