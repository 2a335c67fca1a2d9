"""Targets beside the answers, and the heads that the model is told them through.

Facts of a thing (its colour, its word, how many share its shape, where it is, ...) are read by
linear heads in three places, and the heads are thrown away:

    every patch                    of the thing that covers it
    the last row of a phrase       of the thing that "the red star" names
    the row that answers           where the things of the question are

Attention is taught, too: the row that answers, and the phrase's last row, look at the things they
are about.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from ..scenes import COLOURS, LETTERS, SHAPES, Scene, render_owners
from ..worlds import PATCH, World

PLACES = 4
"""Numbers read from a patch: the centre's offset from it, and the centre's place in the image."""


FACT_WEIGHTS = {f"letter {place}": 3.0 for place in (1, 2, 3)}
"""Weights of facts that are not 1: what is printed is small and most things have nothing printed,
while counts, which are hard to tell from a patch, would take most of the gradient."""


def fact_classes(world: World) -> dict[str, int]:
    """Return name and number of classes of each fact of a thing; a letter's last class is none."""
    counts = ("same colour", "same shape", "same size", "alike", "all")
    return {
        "colour": len(COLOURS),
        "shape": len(SHAPES),
        "size": len(world.radii),
        **{f"letter {place + 1}": len(LETTERS) + 1 for place in range(world.letters)},
        **dict.fromkeys(counts, world.most + 1),
    }


def patch_classes(world: World) -> dict[str, int]:
    """Return name and number of classes of each target of a patch."""
    return {"present": 2, "centre": 2, **fact_classes(world)}


def thing_facts(scene: Scene) -> np.ndarray:
    """Return the facts of every thing: (things, classes + 2), the centre's x and y at the end."""
    world = scene.world
    colours, sizes = list(COLOURS), list(world.radii)
    shared = [
        Counter(kind(t) for t in scene.things)
        for kind in (
            lambda t: t.colour,
            lambda t: t.shape,
            lambda t: t.size,
            lambda t: (t.colour, t.shape),
        )
    ]
    rows = []
    for t in scene.things:
        letters = [LETTERS.index(letter) for letter in t.word or ""]
        letters += [len(LETTERS)] * (world.letters - len(letters))
        keys = (t.colour, t.shape, t.size, (t.colour, t.shape))
        alike = [tally[key] for tally, key in zip(shared, keys, strict=True)]
        kinds = [colours.index(t.colour), SHAPES.index(t.shape), sizes.index(t.size)]
        rows.append([*kinds, *letters, *alike, len(scene.things), t.x, t.y])
    return np.array(rows, np.float32)


def patch_owners(scene: Scene) -> np.ndarray:
    """Return the thing that covers each patch most: (patches,) int, 0 none, i + 1 things[i]."""
    grid = scene.world.side // PATCH
    owners = np.asarray(render_owners(scene)).reshape(grid, PATCH, grid, PATCH)
    owners = owners.transpose(0, 2, 1, 3).reshape(grid * grid, PATCH * PATCH)
    cover = np.stack([(owners == i + 1).sum(1) for i in range(len(scene.things))], 1)
    return np.where(cover.max(1) >= PATCH, cover.argmax(1) + 1, 0)


def patch_targets(scene: Scene, owners: np.ndarray | None = None) -> np.ndarray:
    """Return targets of every patch: (patches, classes + PLACES), -1 where there is no thing.

    Places are fractions of the side. `owners` are those of `patch_owners`, where at hand.
    """
    owners = patch_owners(scene) if owners is None else owners
    grid = scene.world.side // PATCH
    facts = thing_facts(scene)
    targets = np.full((grid * grid, facts.shape[1] + PLACES), -1, np.float32)
    targets[:, :2] = 0
    seen = owners > 0
    targets[seen, 0] = 1
    targets[seen, 2:-PLACES] = facts[owners[seen] - 1, :-2]
    targets[seen, -2:] = facts[owners[seen] - 1, -2:]
    cells = (np.arange(grid) + 0.5) / grid
    middles = np.stack((np.tile(cells, grid), np.repeat(cells, grid)), 1)
    targets[seen, -4:-2] = targets[seen, -2:] - middles[seen]
    for t in scene.things:
        targets[int(t.y * grid) * grid + int(t.x * grid), 1] = 1
    return targets


class FactHead(torch.nn.Module):
    """A linear head on RMS-normalised rows, zero at first."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = torch.nn.Linear(width, outputs)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return outputs (..., outputs) in FP32."""
        rows = rows.float()
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
        with torch.autocast("cpu", enabled=False):
            return self.linear(rows)


def class_loss(outputs: torch.Tensor, targets: torch.Tensor, classes: dict[str, int]):
    """Return the weighted sum of cross-entropies, and each one's accuracy; -1 is ignored.

    Args:
        outputs: (R, sum of classes).
        targets: (R, number of classes).
        classes: name and size of each.
    """
    loss, right = outputs.sum() * 0, {}
    parts = outputs.split([*classes.values()], -1)
    for part, wanted, name in zip(parts, targets.long().unbind(-1), classes, strict=True):
        known = wanted >= 0
        if not known.any():
            continue
        weight = FACT_WEIGHTS.get(name, 1.0)
        loss = loss + weight * F.cross_entropy(part, wanted, ignore_index=-1)
        if name == "centre":
            known = wanted == 1
        right[name] = (part.argmax(-1) == wanted)[known].float().mean().item()
    return loss, right


def place_loss(outputs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return 10 x smooth L1 of places in fractions of the side; 0 where there are none."""
    return 10 * F.smooth_l1_loss(outputs, places, beta=0.03) if len(places) else outputs.sum() * 0


def patch_loss(outputs: torch.Tensor, targets: torch.Tensor, world: World):
    """Return the loss of a head on patches, and the accuracy of each class target.

    Args:
        outputs: (R, classes + PLACES) of the head.
        targets: the same shape, from `patch_targets`.
        world: what the classes are.
    """
    loss, right = class_loss(outputs[:, :-PLACES], targets[:, :-PLACES], patch_classes(world))
    seen = targets[:, 0] > 0
    found, places = outputs[seen, -PLACES:], targets[seen, -PLACES:]
    right["place error"] = (found[:, 2:] - places[:, 2:]).abs().mean().item()
    return loss + place_loss(found, places), right


def at_marks(rows: torch.Tensor, marks: torch.Tensor, length: int) -> torch.Tensor:
    """Return the rows of a band that marks point at: (B, Q, 2, ...) of (B, Q * T, ...).

    Args:
        rows: a value for each text row of the band.
        marks: (B, Q, 2, ...) of `Band.marks`; where no phrase is marked, the first row is taken.
        length: T.
    """
    batch, count = marks.shape[:2]
    index = marks[..., 0].long().clamp_min(0) + length * torch.arange(count)[:, None]
    return rows[torch.arange(batch)[:, None, None], index]


def phrase_loss(states, bands, head: FactHead, world: World):
    """Return the loss of the facts read at the last row of each phrase, and their accuracy.

    Args:
        states: text rows after a layer, (B, Q * T, D) for each band.
        bands: `Band`s of questions.
        head: its outputs are the classes of a thing, how many things fit, x and y.
        world: what the classes are.
    """
    rows, marks = [], []
    for hidden, band in zip(states, bands, strict=True):
        named = band.marks[..., 0] >= 0
        rows.append(at_marks(hidden, band.marks, band.ids.shape[2])[named])
        marks.append(band.marks[named])
    outputs, marks = head(torch.cat(rows)), torch.cat(marks)
    classes = fact_classes(world)
    loss, right = class_loss(
        outputs[:, :-2],
        torch.cat((marks[:, 1 : 1 + len(classes)], marks[:, -2:-1]), -1),
        {**classes, "fitting": world.most + 1},
    )
    one = marks[:, -1] >= 0
    return loss + place_loss(outputs[one, -2:], marks[one, -4:-2]), right


def tell_loss(states, bands, head: FactHead) -> torch.Tensor:
    """Return the loss of x, y of the first and the second thing, read at the row that answers.

    Args:
        states: text rows after a layer, (B, Q * T, D) for each band.
        bands: `Band`s of questions.
        head: its four outputs are x, y of the first, x, y of the second.
    """
    found, places = [], []
    for hidden, band in zip(states, bands, strict=True):
        one = band.marks[..., -1] >= 0
        outputs = head(at_marks(hidden, band.speaks(), band.ids.shape[2])[:, :, 0])
        found.append(outputs.unflatten(-1, (2, 2))[one])
        places.append(band.marks[..., -4:-2][one])
    return place_loss(torch.cat(found), torch.cat(places))


def look_loss(masses, owners: torch.Tensor, bands, heads: int = 3) -> torch.Tensor:
    """Return how far the row that answers looks past what its question is about.

    Args:
        masses: for each band of questions, attention (B, H, Q * T, P + N + T) of one layer.
        owners: (B, N) the thing that covers each patch, from `patch_owners`.
        bands: `Band`s of questions.
        heads: number of heads that the loss applies to; the others are free.
    """
    losses = []
    for mass, band in zip(masses, bands, strict=True):
        things = _things(owners, band.wanted.shape[-1])
        seen = _on_patches(mass[:, :heads], band.speaks(), band, owners.shape[1])[:, :, 0]
        wanted = band.wanted & (things.sum(1) > 0)[:, None]
        losses.append(-(seen @ things + 1e-4).log()[wanted])
    return _mean(torch.cat(losses))


def phrase_look_loss(masses, owners: torch.Tensor, bands, heads: int = 2) -> torch.Tensor:
    """Return how far the last row of each phrase looks past the one thing that it names.

    Args:
        masses: for each band of questions, attention (B, H, Q * T, P + N + T) of one layer.
        owners: (B, N) the thing that covers each patch, from `patch_owners`.
        bands: `Band`s of questions.
        heads: number of heads, counted from the last, that the loss applies to.
    """
    losses = []
    for mass, band in zip(masses, bands, strict=True):
        things = _things(owners, band.wanted.shape[-1])
        seen = _on_patches(mass[:, -heads:], band.marks, band, owners.shape[1])
        which = band.marks[..., -1].long()
        share = (seen.flatten(1, 2) @ things).view(*which.shape, -1)
        share = share.gather(-1, which.clamp_min(0)[..., None])[..., 0]
        there = (things.sum(1) > 0)[:, None, None].expand(*which.shape, -1)
        there = there.gather(-1, which.clamp_min(0)[..., None])[..., 0] & (which >= 0)
        losses.append(-(share + 1e-4).log()[there])
    return _mean(torch.cat(losses))


def _things(owners: torch.Tensor, most: int) -> torch.Tensor:
    """Return which patches each thing has: (B, N, most) of zeros and ones."""
    return F.one_hot(owners.long(), most + 1)[..., 1:].float()


def _on_patches(mass, marks, band, visual: int) -> torch.Tensor:
    """Return the attention of marked rows to the patches, a mean over heads: (B, Q, 2, N)."""
    length = band.ids.shape[2]
    front = mass.shape[-1] - visual - length
    seen = mass.float().mean(1)[..., front : front + visual]
    return at_marks(seen, marks, length)


def _mean(losses: torch.Tensor) -> torch.Tensor:
    return losses.mean() if len(losses) else losses.sum()
