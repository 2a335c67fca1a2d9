"""Scenes of three to six flat shapes, and how they are drawn.

A scene is data: positions and sizes are fractions of the image, so that one scene can be drawn at
any size. The inventory of a scene (the multiset of size, colour and shape) decides whether it is
held out, not a seed: no inventory seen in training occurs among the held-out scenes.

    x, y in (0, 1), y downwards            radius: small 0.085, large 0.14 of the side
    +-------------------+
    |  ■            ★   |
    |        ●K         |
    |   ◆          ▲    |
    +-------------------+
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (205, 40, 40),
    "green": (45, 150, 60),
    "blue": (45, 80, 205),
    "yellow": (240, 215, 45),
    "orange": (240, 130, 25),
    "purple": (135, 55, 165),
    "white": (248, 248, 248),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"small": 0.085, "large": 0.14}
PRINTABLE = ("circle", "square", "diamond")

# Five columns by seven rows, one number a row, the leftmost column in the highest bit.
GLYPHS = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Z": (31, 1, 2, 4, 8, 16, 31),
}
LETTERS = tuple(GLYPHS)

_GAP = 0.025
_HELD_OUT_OF = 8


@dataclass(frozen=True)
class Thing:
    """One object: its shape, colour, size and centre."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    letter: str | None = None

    @property
    def radius(self) -> float:
        """Return the radius as a fraction of the image's side."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """The objects of one image, the tint of its background and the seed of its paint."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    paint_seed: int = 0


def pick(rng: random.Random, items):
    """Return one of `items`, drawn with `rng.random()` alone: Python keeps its stream stable."""
    return items[int(rng.random() * len(items))]


def make_scene(rng: random.Random, things: int | None = None, held_out: bool = False) -> Scene:
    """Draw scenes until one falls on the wanted side of the split.

    Args:
        rng: the source of chance; only `random()` is called.
        things: number of objects, three to six where None.
        held_out: draw a scene that training never sees.
    """
    while True:
        count = things if things is not None else 3 + int(rng.random() * 4)
        scene = _attempt(rng, count)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def is_held_out(scene: Scene) -> bool:
    """Return whether the inventory of `scene` is in the eighth that training leaves out."""
    inventory = sorted(f"{t.size} {t.colour} {t.shape}" for t in scene.things)
    return zlib.crc32("|".join(inventory).encode()) % _HELD_OUT_OF == 0


def _attempt(rng: random.Random, count: int) -> Scene | None:
    things: list[Thing] = []
    for _ in range(count):
        repeat = pick(rng, things) if things else None
        colour = repeat.colour if repeat and rng.random() < 0.3 else pick(rng, list(COLOURS))
        shape = repeat.shape if repeat and rng.random() < 0.3 else pick(rng, SHAPES)
        size = pick(rng, list(SIZES))
        place = _place(rng, SIZES[size], things)
        if place is None:
            return None
        letter = None
        if size == "large" and shape in PRINTABLE and rng.random() < 0.7:
            letter = pick(rng, LETTERS)
        things.append(Thing(shape, colour, size, *place, letter))
    grey = 150 + int(rng.random() * 40)
    background = tuple(grey + int(rng.random() * 13) - 6 for _ in range(3))
    return Scene(tuple(things), background, int(rng.random() * 2**31))


def _place(rng: random.Random, radius: float, things: list[Thing]) -> tuple[float, float] | None:
    margin = radius + 0.01
    for _ in range(40):
        x = round(margin + rng.random() * (1 - 2 * margin), 4)
        y = round(margin + rng.random() * (1 - 2 * margin), 4)
        if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + _GAP for t in things):
            return x, y
    return None


def render_scene(scene: Scene, size: int = 96, oversample: int = 3) -> Image.Image:
    """Draw `scene` as a square RGB image of `size` pixels, smoothed by `oversample`."""
    side = size * oversample
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    rng = random.Random(scene.paint_seed)
    for thing in scene.things:
        base = COLOURS[thing.colour]
        fill = tuple(max(0, min(255, c + int(rng.random() * 21) - 10)) for c in base)
        _draw_shape(draw, thing, side, fill)
        if thing.letter:
            _draw_letter(draw, thing, side, base)
    return image.reduce(oversample) if oversample > 1 else image


def render_owners(scene: Scene, size: int = 96) -> Image.Image:
    """Draw each pixel's object as a number: 0 is the background, i + 1 is `scene.things[i]`."""
    owners = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(owners)
    for index, thing in enumerate(scene.things):
        _draw_shape(draw, thing, size, index + 1)
    return owners


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, side: int, fill) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape == "circle":
        draw.ellipse((x - 0.95 * r, y - 0.95 * r, x + 0.95 * r, y + 0.95 * r), fill=fill)
    elif thing.shape == "square":
        draw.rectangle((x - 0.82 * r, y - 0.82 * r, x + 0.82 * r, y + 0.82 * r), fill=fill)
    elif thing.shape == "cross":
        draw.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=fill)
        draw.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=fill)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in _OUTLINES[thing.shape]], fill=fill)


def _star() -> list[tuple[float, float]]:
    spokes = [(1.05 if i % 2 == 0 else 0.45, math.pi * i / 5) for i in range(10)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in spokes]


_OUTLINES = {
    "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
    "diamond": [(0, -1.05), (1.05, 0), (0, 1.05), (-1.05, 0)],
    "star": _star(),
}


def _draw_letter(draw: ImageDraw.ImageDraw, thing: Thing, side: int, base) -> None:
    ink = (20, 20, 20) if sum(base) > 380 else (250, 250, 250)
    cell = thing.radius * side * 0.155
    left, top = thing.x * side - 2.5 * cell, thing.y * side - 3.5 * cell
    for row, bits in enumerate(GLYPHS[thing.letter]):
        for column in range(5):
            if bits >> (4 - column) & 1:
                x, y = left + column * cell, top + row * cell
                draw.rectangle((x, y, x + cell, y + cell), fill=ink)
