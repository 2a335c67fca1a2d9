"""Routers of a checkpoint against the routing of a plan: whether one reads what the other has.

Routers are trained for a model and lie among its tensors. A plan with a routing reads all of them.
A plan without one leaves them out, and then every row runs: that is the model that they were
trained for, so it may be built, but only where the plan was named.
"""

from __future__ import annotations

from ...graphs.errors import ModelError
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.routing import ROUTERS, Routing, is_router
from .checkpoint import Checkpoint
from .names import router_shapes
from .safetensors_file import FLOAT_DTYPES, few


def check_routers(checkpoint: Checkpoint, plan: StagePlan, *, named: bool) -> None:
    """Refuse a checkpoint whose routers are not those that a plan reads.

    ``named``: the plan was asked for by its name, or as a file.

    Raises:
        ModelError: tensors that lack, are unread, or of another shape or type; or routers that a
            plan would leave out without having been chosen.
    """
    text = checkpoint.config.text
    found = {name: info for name, info in checkpoint.tensors.items() if is_router(name)}
    if plan.routing is None:
        if found and not named:
            plans = " or ".join(f"--plan {name}" for name in _fitting(checkpoint))
            raise ModelError(
                f"{checkpoint.path} holds routers ({few([*found])}), and no plan was named. Name "
                f"one that reads them{plans and ': ' + plans}, or one that leaves them out, so "
                "that every row runs: --plan dense."
            )
        return
    wanted = router_shapes(text, plan.routing)
    missing = [name for name in wanted if name not in found]
    if missing:
        has = f"holds {few([*found])} instead" if found else "holds no routers"
        fitting = _fitting(checkpoint)
        remedy = (
            f"Take the plan that they are of: {' or '.join(fitting)}"
            if fitting
            else "Save the routers that were trained for this model beside its tensors, under "
            'these names (docs/methods.md, "Routed depth"), or take a plan without routers'
        )
        raise ModelError(
            f"{checkpoint.path} lacks {few(missing)}, the routers of plan '{plan.name}'; it {has}. "
            f"{remedy}."
        )
    for name, shape in wanted.items():
        info = found[name]
        if info.shape != shape or info.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{info.file} holds {name} as {info.dtype} with shape {list(info.shape)}, plan "
                f"'{plan.name}' reads {list(shape)} in one of {', '.join(FLOAT_DTYPES)}. Take the "
                "plan that the routers are of, or save them again."
            )
    unread = [name for name in found if name not in wanted]
    if unread:
        raise ModelError(
            f"{checkpoint.path} holds {few(unread)} that plan '{plan.name}' does not read: answers "
            "would differ from the checkpoint's. Take the plan that the routers are of, or remove "
            "the tensors."
        )


def _fitting(checkpoint: Checkpoint) -> list[str]:
    """Return the kinds of routers that the checkpoint's are of."""
    found = {name: info.shape for name, info in checkpoint.tensors.items() if is_router(name)}
    return [
        name for name in ROUTERS if found == router_shapes(checkpoint.config.text, _routing(name))
    ]


def _routing(kind: str) -> Routing:
    """Return some routing of a kind; the shapes follow from the kind alone."""
    return Routing(kind, sparsity=0.25 if ROUTERS[kind].whole_prompt else None)
