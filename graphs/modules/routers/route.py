"""The way of a call's rows through a sublayer: which of them run, and what they get of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops import Eager


class Route(NamedTuple):
    """Way of a call's rows through one sublayer.

    scale: (B, q, 1) FP32, gates: what the sublayer adds is multiplied by them. picked: (B, q)
    int64, the rows that run, the last one first; None: all of them, in their order.
    """

    scale: Tensor
    picked: Tensor | None = None


def taken(ops: Eager, x: Tensor, route: Route | None, like: Tensor) -> Tensor:
    """Return those of rows x (B*Q, D) that run, (B*q, D); ``like`` is (B, Q, ...)."""
    if route is None or route.picked is None:
        return x
    width = x.shape[-1]
    rows = ops.take(ops.reshape(x, (*like.shape[:2], width), like), route.picked)
    return ops.reshape(rows, (route.picked.shape[0] * route.picked.shape[1], width))


def added(
    ops: Eager, x: Tensor, update: Tensor, shift: int, route: Route | None, like: Tensor
) -> Tensor:
    """Add to the residual x (B*Q, D) an update (B*q, D) of the rows that run, under their gates.

    The update came scaled by 2**-shift; ``like`` is (B, Q, ...).
    """
    if route is None or route.picked is None:
        return _sum(x, update, shift, None if route is None else route.scale.flatten(0, 1))
    width = x.shape[-1]
    rows = ops.reshape(x, (*like.shape[:2], width), like)
    ran = ops.take(rows, route.picked)
    update = ops.reshape(update, (*route.picked.shape, width), ran)
    rows = ops.put(rows, route.picked, _sum(ran, update, shift, route.scale))
    return ops.reshape(rows, x.shape)


def _sum(x: Tensor, update: Tensor, shift: int, gain: Tensor | None) -> Tensor:
    """Add to x an update that came scaled by 2**-shift, in FP32 where either is wider than FP16 or
    was scaled to fit it. ``gain`` multiplies the update, row by row.
    """
    if not shift:
        update = update.to(x.dtype)
        return x + (update if gain is None else update * gain.to(x.dtype))
    update = update.float() * 2.0**shift
    return (x.float() + (update if gain is None else update * gain)).to(x.dtype)
