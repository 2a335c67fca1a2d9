"""A start for the projector from what least squares reads off the vision encoder.

The vision encoder's features hold every fact about a patch, but some (an object's position, for
instance) in directions of little variance, which an untrained decoder takes very long to find. So
the first linear map begins with one row for each fact, all of one size, and the whitened principal
components of the features in the other rows; both are then trained as usual.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from ..scenes import make_scene, render_scene
from ..worlds import DEMO, World
from . import packed
from .batches import normalise_pixels
from .supervision import PLACES, patch_classes, patch_targets


@torch.no_grad()
def align_projector(
    model, world: World = DEMO, images: int = 600, ridge: float = 1e-4
) -> dict[str, float]:
    """Set the projector of `model`; return how well each fact is read (R squared)."""
    rng = random.Random("align")
    scenes = [make_scene(rng, world=world) for _ in range(images)]
    features = []
    for first in range(0, images, 50):
        part = scenes[first : first + 50]
        pixels = np.stack([np.asarray(render_scene(s)).transpose(2, 0, 1) for s in part])
        pixels = normalise_pixels(torch.from_numpy(pixels))
        features.append(packed.encoder_features(model, pixels)[:, 1:].flatten(0, 1))
    features = torch.cat(features).double()
    facts, names = _facts(np.concatenate([patch_targets(s) for s in scenes]), world)
    mean = features.mean(0)
    centred = features - mean
    cover = centred.T @ centred / len(centred)
    values, vectors = torch.linalg.eigh(cover)
    inverse = torch.linalg.inv(cover + ridge * values.mean() * torch.eye(len(cover)))
    wanted = torch.from_numpy(facts).double()
    wanted = (wanted - wanted.mean(0)) / (wanted.std(0) + 1e-9)
    probes = (inverse @ (centred.T @ wanted) / len(centred)).T
    read = centred @ probes.T
    fit = 1 - (wanted - read).square().mean(0)
    probes /= read.std(0)[:, None]

    one, two = (
        model.model.multi_modal_projector.linear_1,
        model.model.multi_modal_projector.linear_2,
    )
    rows = torch.cat((probes, (vectors / values.clamp_min(1e-6).sqrt()).T.flip(0)))
    rows = rows[: one.out_features]
    one.weight.copy_(rows)
    one.bias.copy_(-rows @ mean)
    torch.nn.init.orthogonal_(two.weight)
    two.bias.zero_()
    return dict(zip(names, fit.tolist(), strict=True))


def _facts(targets: np.ndarray, world: World) -> tuple[np.ndarray, list[str]]:
    """Return columns of facts about each patch, with names, from the rows of `patch_targets`."""
    seen, columns, names = targets[:, 0] > 0, [targets[:, 0], targets[:, 1]], ["present", "centre"]
    for place, (name, classes) in enumerate(patch_classes(world).items()):
        if place < 2:
            continue
        for value in range(classes):
            column = (targets[:, place] == value).astype(np.float32)
            if column.any():
                columns.append(column)
                names.append(f"{name} {value}")
    for place, name in zip(range(-PLACES, 0), ("dx", "dy", "x", "y"), strict=True):
        middle = 0.5 if name in "xy" else 0.0
        column = np.where(seen, targets[:, place] - middle, 0)
        columns += [column, -column]
        names += [name, f"-{name}"]
    return np.stack(columns, 1), names
