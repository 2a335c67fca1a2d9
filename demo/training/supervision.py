"""Targets that pretrain the vision encoder, before any language: what each patch shows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from ..scenes import COLOURS, LETTERS, SHAPES, SIZES, Scene, render_owners

# Name and number of classes of each target; the last class of "letter" is no letter.
CLASSES = {
    "present": 2,
    "centre": 2,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "letter": len(LETTERS) + 1,
    "same colour": 7,
    "same shape": 7,
    "all": 7,
}
NUMBERS = 4  # the centre's offset from the patch, and the centre's place in the image
PATCH_OUTPUTS = sum(CLASSES.values()) + NUMBERS


def patch_owners(scene: Scene, grid: int = 12, patch: int = 8) -> np.ndarray:
    """Return the thing that covers each patch most: (grid * grid,) int, 0 none, i + 1 things[i]."""
    owners = np.asarray(render_owners(scene, grid * patch)).reshape(grid, patch, grid, patch)
    owners = owners.transpose(0, 2, 1, 3).reshape(grid * grid, patch * patch)
    cover = np.stack([(owners == i + 1).sum(1) for i in range(len(scene.things))], 1)
    return np.where(cover.max(1) >= patch, cover.argmax(1) + 1, 0)


def patch_targets(scene: Scene, grid: int = 12, patch: int = 8) -> np.ndarray:
    """Return targets of every patch: (grid * grid, len(CLASSES) + NUMBERS), -1 where undefined."""
    owner = patch_owners(scene, grid, patch)
    colours = Counter(t.colour for t in scene.things)
    shapes = Counter(t.shape for t in scene.things)
    names = list(COLOURS)
    table = np.full((len(scene.things) + 1, len(CLASSES) + NUMBERS), -1.0, np.float32)
    table[0, 0] = 0
    for row, t in enumerate(scene.things, 1):
        table[row] = (
            *(1, 0, names.index(t.colour), SHAPES.index(t.shape), list(SIZES).index(t.size)),
            LETTERS.index(t.letter) if t.letter else len(LETTERS),
            *(colours[t.colour], shapes[t.shape], len(scene.things), 0, 0, t.x, t.y),
        )
    targets = table[owner]
    targets[:, 1] = 0
    cells = (np.arange(grid) + 0.5) / grid
    seen = owner > 0
    targets[seen, -4] = (targets[:, -2] - np.tile(cells, grid))[seen] * 4
    targets[seen, -3] = (targets[:, -1] - np.repeat(cells, grid))[seen] * 4
    for t in scene.things:
        targets[int(t.y * grid) * grid + int(t.x * grid), 1] = 1
    return targets


def patch_loss(outputs: torch.Tensor, targets: torch.Tensor):
    """Return the mean loss over targets, and the accuracy of each class target.

    Args:
        outputs: (R, OUTPUTS) of the linear head.
        targets: (R, len(CLASSES) + NUMBERS).
    """
    parts = outputs.split([*CLASSES.values(), NUMBERS], -1)
    loss, right = 0.0, {}
    for column, name in enumerate(CLASSES):
        wanted = targets[:, column].long()
        loss = loss + F.cross_entropy(parts[column], wanted, ignore_index=-1)
        with torch.no_grad():
            known = wanted >= 0
            if name == "centre":
                known &= wanted == 1
            right[name] = (parts[column].argmax(-1) == wanted)[known].float().mean().item()
    seen = targets[:, 0] > 0
    numbers = F.smooth_l1_loss(parts[-1][seen], targets[seen, -NUMBERS:], beta=0.1)
    right["place error"] = (parts[-1][seen, 2:] - targets[seen, -2:]).abs().mean().item()
    return loss + 4 * numbers, right


def look_loss(masses, owners: torch.Tensor, asked, heads: int = 3) -> torch.Tensor:
    """Return how far the row that answers looks past what its question is about.

    Args:
        masses: for each band of questions, attention (B, H, Q * T, P + N + T) of one layer.
        owners: (B, N) the thing that covers each patch, from `patch_owners`.
        asked: for each band, (ids, targets, wanted).
        heads: number of heads that the loss applies to; the others are free.
    """
    things = F.one_hot(owners.long(), 7)[..., 1:].float()
    visual, losses = owners.shape[1], []
    for mass, (_, targets, wanted) in zip(masses, asked, strict=True):
        _, count, rows = targets.shape
        front = mass.shape[-1] - visual - rows
        speaks = (targets >= 0).float().argmax(-1) + torch.arange(count) * rows
        index = speaks[:, None, :, None].expand(-1, heads, -1, visual)
        seen = mass[:, :heads, :, front : front + visual].gather(2, index).mean(1)
        losses.append(-(seen @ things + 1e-4).log()[wanted])
    return torch.cat(losses).mean()
