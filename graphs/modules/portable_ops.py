"""The lowering to basic operators, up to opset 20: for older runtimes. Writing the cache is left to
its caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .onnx_ops import Onnx
from .ops import Gate, Scales, View, grouped, masked_softmax, sees


class Portable(Onnx):
    """Basic operators only. The cache is read, never written: new rows are returned."""

    name = "portable"
    returns_new_rows = True
    opset = 20

    def view(self, order: Tensor, slot_order: Tensor, write_index: Tensor) -> View:
        """Return a view of old slots and new rows apart.

        Slots about to be overwritten still hold stale rows and are hidden; what ``slot_order``
        says about them belongs to the new rows.
        """
        new, slots = order.shape[1], slot_order.shape[1]
        start = write_index[:, None]
        window = start + torch.arange(new, device=order.device)
        slot = torch.arange(slots, device=order.device)[None]
        stale = (slot >= start) & (slot < start + new)
        old = sees(order, slot_order) & ~stale[:, None, None, :]
        return View(
            write_index,
            torch.cat((old, sees(order, torch.gather(slot_order, 1, window))), -1),
            window,
        )

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor],
        view: View,
        gate: Gate | None,
        scales: Scales | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the old slots and the new rows in one softmax, without joining them.

        Returns the output, and k, v as they came, or with ``scales`` as they are to be cached.
        """
        assert view.window is not None
        keys, values = cache
        fresh = k, v
        if scales is not None:
            fresh = self.stored(k, scales[0]), self.stored(v, scales[1])
            k, v = self.read(fresh[0], scales[0]), self.read(fresh[1], scales[1])
            keys, values = self.read(keys, scales[0]), self.read(values, scales[1])
        slots = keys.shape[2]
        visible, seen_old, seen_new = view.visible, values, v
        if gate is not None:
            new = Gate(
                torch.gather(gate.value, 1, view.window),
                None if gate.sink is None else torch.gather(gate.sink, 1, view.window),
                gate.renorm,
            )
            if gate.renorm:
                open_ = torch.cat((gate.value, new.value), -1) > 0
                visible = visible & open_[:, None, None, :]
            else:
                # A sink opens only for text, and text comes after the image: the first visual
                # value is always in an old slot.
                first = gate.first_visual(values)
                seen_old, seen_new = gate.values(values, first), new.values(v, first)

        shared = grouped(q, k)
        scores = torch.cat((shared @ keys.transpose(-1, -2), shared @ k.transpose(-1, -2)), -1)
        probs = masked_softmax(scores, visible, q.shape, k.shape[1]).to(q.dtype)
        out = probs[..., :slots] @ seen_old + probs[..., slots:] @ seen_new
        return out.reshape(q.shape), *fresh
