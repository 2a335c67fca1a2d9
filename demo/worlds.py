"""The worlds: for each demo model, a description of its scenes and questions.

    DEMO      three to six things on 96 pixels, 144 visual tokens; one letter a thing
    CROWDED   eight to sixteen things of three sizes on 192 pixels, 576 visual tokens; words

A description is data. Scenes, questions, training and tests read it, so that a world more is an
entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The kind of scene that a model is trained on and asked about.

    Attributes:
        name: the name of the model that answers about them.
        side: side of the image in pixels.
        fewest: objects in the simplest scene.
        most: objects in the richest scene.
        radii: radius of each size, as a fraction of the side.
        printed: least and greatest number of letters on a printable thing of a size.
        gap: least distance between two things, as a fraction of the side.
        repeat: how often a thing has the colour, and how often the shape, of another one.
        phrases: the attributes that a noun phrase for one thing may name.
        counted: the attributes that the noun of a count names, one entry for each draw.
        tallies: a count is 0 where a draw is below the first of these, 1 below the second, ...
        reading: the wordings of a question about what is printed.
    """

    name: str
    side: int
    fewest: int
    most: int
    radii: Mapping[str, float]
    printed: Mapping[str, tuple[int, int]]
    gap: float
    repeat: float
    phrases: tuple[tuple[str, ...], ...]
    counted: tuple[tuple[str, ...], ...]
    tallies: tuple[float, ...]
    reading: tuple[str, ...]

    @property
    def visual_tokens(self) -> int:
        """Return the number of patches of an image."""
        return (self.side // PATCH) ** 2

    @property
    def letters(self) -> int:
        """Return the number of letters in the longest word."""
        return max(most for _, most in self.printed.values())


PATCH = 8
"""Side of a patch of the vision encoder in pixels, the same in every world."""

DEMO = World(
    name="demo",
    side=96,
    fewest=3,
    most=6,
    radii={"small": 0.085, "large": 0.14},
    printed={"large": (1, 1)},
    gap=0.025,
    repeat=0.3,
    phrases=(
        ("shape",),
        ("colour",),
        ("colour", "shape"),
        ("size", "shape"),
        ("size", "colour"),
    ),
    counted=((), ("colour",), ("colour",), ("shape",), ("shape",), ("size",)),
    tallies=(0.15, 0.4, 0.7),
    reading=(
        "Which letter is on the {}?",
        "What letter does the {} carry?",
        "Read the letter on the {}.",
    ),
)

CROWDED = World(
    name="demo-576",
    side=192,
    fewest=8,
    most=16,
    radii={"small": 0.042, "medium": 0.062, "large": 0.09},
    printed={"medium": (1, 1), "large": (2, 3)},
    gap=0.015,
    repeat=0.4,
    phrases=(
        ("shape",),
        ("colour",),
        ("colour", "shape"),
        ("size", "shape"),
        ("size", "colour"),
        ("size", "colour", "shape"),
    ),
    counted=(
        *(("colour",), ("shape",), ("size", "shape"), ("size", "colour")),
        *(("colour", "shape"), ("colour", "shape")),
    ),
    tallies=(0.12, 0.3, 0.5, 0.7, 0.86),
    reading=(
        "Which letters are on the {}?",
        "What letters does the {} carry?",
        "Read the letters on the {}.",
    ),
)

WORLDS = {world.name: world for world in (DEMO, CROWDED)}
"""The worlds by the name of the model that answers about them."""
