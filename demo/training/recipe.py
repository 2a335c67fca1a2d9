"""The numbers of the training: how much of what, for each world, and how rates fall.

Everything follows the number of images, not the clock: a busy machine makes the same model slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..questions import KINDS
from ..worlds import CROWDED, DEMO, World
from . import packed

LOOK_LAYERS = (3, 4)
"""Layers in which three heads of the row that answers look at what the question is about."""

PHRASE_LAYERS = (3, 4)
"""Layers after which the last row of a phrase says what it names."""

PHRASE_LOOK_LAYER = 3
"""The layer in which the last two heads of that row look at what it names."""

TELL_LAYERS = (5, 6)
"""Layers after which the row that answers says where the things of the question are."""

WEIGHTS = {
    "phrase": 0.3,
    "tell": 0.2,
    "phrase look": 0.15,
    "look": 0.2,
    "patch": 0.3,
    "projected": 0.3,
}
"""Weight of each loss beside that of the answers; `look` and `phrase look` are sums of layers."""

ASKED = {
    "colour": 0.75,
    "shape": 0.5,
    "count": 2,
    "yes/no": 1.25,
    "position": 1.25,
    "relation": 2,  # half of these, and of reading, find nothing to ask about
    "reading": 2.5,
}
"""Frequency of each kind of question."""


@dataclass(frozen=True)
class Recipe:
    """One model's training.

    Attributes:
        world: what scenes and questions are like.
        out: where the model is saved.
        encoder_images: images for the vision encoder alone.
        images: images for all of it.
        questions: questions about each image.
        batch: images of a step in each process.
        few: number of objects in the small scenes at the beginning.
        easy_vqa: share of batches from easy-VQA's training split.
        dropout: share of batches in which only some of the visual tokens come in.
        start: folder of a model to start from, instead of from scratch.
        encoder_rate: Muon's learning rate for the vision encoder alone.
        vision_rate: the vision encoder's later rates as a share of the decoder's.
    """

    world: World
    out: Path
    encoder_images: int
    images: int
    questions: int
    batch: int
    few: tuple[int, int]
    easy_vqa: float
    dropout: float
    start: Path | None = None
    encoder_rate: float = 0.02
    vision_rate: float = 0.3

    @property
    def kinds(self) -> tuple[float, ...]:
        """Return how often each of `KINDS` is asked, in their order."""
        return tuple(ASKED[kind] for kind in KINDS)


_RECIPES = (
    Recipe(
        DEMO,
        Path("demo/model"),
        encoder_images=54_000,
        images=18_000,
        questions=16,
        batch=8,
        few=(1, 3),
        easy_vqa=0.18,
        dropout=0.2,
    ),
    Recipe(
        CROWDED,
        Path("demo/model-576"),
        encoder_images=16_000,
        encoder_rate=0.01,  # it starts from one that has learnt
        images=8_000,
        questions=32,
        batch=4,
        few=(3, 8),
        easy_vqa=0.0,
        dropout=0.5,
        start=Path("demo/model"),
        vision_rate=1.0,
    ),
)
RECIPES = {recipe.world.name: recipe for recipe in _RECIPES}
"""The recipes by the name of the model."""


def schedule(spent: float, warm: float = 0.02, flat: float = 0.4) -> float:
    """Return the learning-rate factor at the share `spent` of the images: rise, stay, fall to 0."""
    if spent < warm:
        return spent / warm
    if spent < flat:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (spent - flat) / (1 - flat)))


def draw_staging() -> packed.TrainStages:
    """Draw how the next batch sees its image: dense, or in stages as compiled plans do."""
    draw = torch.rand(()).item()
    if draw < 0.3:
        return packed.DENSE_STAGES
    if draw < 0.7:
        return packed.TrainStages(blind=2, last=4)
    return packed.TrainStages(blind=2, select_after=4, keep=16, last=6)


def draw_entering(owners: torch.Tensor) -> torch.Tensor:
    """Draw visual tokens that come in, a quarter to five sixths of them, more often few: (B, n).

    In six images of ten those on things come first. `owners` (B, N): 0 is the background.
    """
    batch, visual = owners.shape
    least, most = visual // 4, visual * 5 // 6
    count = least + int((most - least) * torch.rand(()).item() ** 2)
    first = (owners > 0) & (torch.rand(batch, 1) < 0.6)
    order = torch.rand(batch, visual) + first.float()
    return order.topk(count, -1).indices.sort(-1).values
