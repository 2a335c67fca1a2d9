"""Muon for the matrices between layers, AdamW for everything else, behind one `step`.

Muon (Jordan et al., 2024) replaces a matrix's momentum by its nearest semi-orthogonal matrix, found
with five Newton-Schulz steps, which the training processes divide among themselves.
"""

from __future__ import annotations

import torch

from . import data_parallel


class Optimizer:
    """Muon on `matrices`, AdamW on `others`; `step(scale)` multiplies both learning rates.

    Newton-Schulz runs in `dtype`: BF16 is exact enough, and faster where the CPU multiplies it.
    """

    def __init__(
        self, matrices, others, muon_lr: float = 0.02, adam_lr: float = 2e-3, dtype=torch.float32
    ):
        self.dtype = dtype
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for weight in matrices:
            self.groups.setdefault(tuple(weight.shape), []).append(weight)
        self.momentum = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.parameters = [*matrices, *others]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every weight from its gradient, then clear the gradients."""
        updates, mine = [], data_parallel.rank_slice()
        for shape, group in self.groups.items():
            gradient = torch.stack([weight.grad for weight in group])
            momentum = self.momentum[shape].lerp_(gradient, 0.05)
            update = torch.zeros_like(gradient)
            update[mine] = orthogonalise(gradient.lerp(momentum, 0.95)[mine], self.dtype)
            updates.append(update)
        if updates:
            data_parallel.all_reduce(updates)
        rate = self.muon_lr * scale
        for (shape, group), update in zip(self.groups.items(), updates, strict=True):
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - 0.02 * rate)
                weight.add_(change, alpha=-rate * max(1.0, shape[0] / shape[1]) ** 0.5)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        others = self.adam.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        self.adam.step()
        for weight in self.parameters:
            weight.grad = None

    def state_dict(self) -> dict:
        """Return the state needed to resume."""
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])


def orthogonalise(batch: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Return approximately the nearest semi-orthogonal matrices to `batch` (G, M, N).

    The steps are taken in `dtype`, the result has that of `batch`.
    """
    tall = batch.shape[1] > batch.shape[2]
    x = batch.transpose(1, 2) if tall else batch
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.transpose(1, 2) if tall else x).to(batch.dtype)
