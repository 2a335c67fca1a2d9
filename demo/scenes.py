"""Scenes of flat shapes, and how they are drawn; `worlds.py` says how many and how large.

A scene is data: positions and sizes are fractions of the image, so that one scene can be drawn at
any size. The inventory of a scene (the multiset of size, colour and shape) decides whether it is
held out, not a seed: no inventory seen in training occurs among the held-out scenes.

    x, y in (0, 1), y downwards            radius: a fraction of the side
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

from .worlds import DEMO, World

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

_CELLS = {1: 0.155, 2: 0.105, 3: 0.075}
"""Side of a letter's cells as a fraction of the thing's radius, by the number of letters."""

_HELD_OUT_OF = 8


@dataclass(frozen=True)
class Thing:
    """One object: its shape, colour and size, its centre and radius, and what is printed on it."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    word: str | None = None


@dataclass(frozen=True)
class Scene:
    """The objects of one image, the tint of its background, the seed of its paint, and its kind."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    paint_seed: int = 0
    world: World = DEMO


def pick(rng: random.Random, items):
    """Return one of `items`, drawn with `rng.random()` alone: Python keeps its stream stable."""
    return items[int(rng.random() * len(items))]


def make_scene(
    rng: random.Random, things: int | None = None, held_out: bool = False, world: World = DEMO
) -> Scene:
    """Draw scenes until one falls on the wanted side of the split.

    Args:
        rng: the source of chance; only `random()` is called.
        things: number of objects, any that `world` has where None.
        held_out: draw a scene that training never sees.
        world: what scenes are like.
    """
    span = world.most - world.fewest + 1
    while True:
        count = things if things is not None else world.fewest + int(rng.random() * span)
        scene = _attempt(rng, count, world)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def is_held_out(scene: Scene) -> bool:
    """Return whether the inventory of `scene` is in the eighth that training leaves out."""
    inventory = sorted(f"{t.size} {t.colour} {t.shape}" for t in scene.things)
    return zlib.crc32("|".join(inventory).encode()) % _HELD_OUT_OF == 0


def _attempt(rng: random.Random, count: int, world: World) -> Scene | None:
    things: list[Thing] = []
    for _ in range(count):
        repeat = pick(rng, things) if things else None
        again = repeat and rng.random() < world.repeat
        colour = repeat.colour if again else pick(rng, list(COLOURS))
        again = repeat and rng.random() < world.repeat
        shape = repeat.shape if again else pick(rng, SHAPES)
        size = pick(rng, list(world.radii))
        radius = world.radii[size]
        place = _place(rng, radius, things, world.gap)
        if place is None:
            return None
        word = None
        if size in world.printed and shape in PRINTABLE and rng.random() < 0.7:
            fewest, most = world.printed[size]
            letters = fewest if fewest == most else fewest + int(rng.random() * (most - fewest + 1))
            word = "".join(pick(rng, LETTERS) for _ in range(letters))
        things.append(Thing(shape, colour, size, *place, radius, word))
    grey = 150 + int(rng.random() * 40)
    background = tuple(grey + int(rng.random() * 13) - 6 for _ in range(3))
    return Scene(tuple(things), background, int(rng.random() * 2**31), world)


def _place(
    rng: random.Random, radius: float, things: list[Thing], gap: float
) -> tuple[float, float] | None:
    margin = radius + 0.01
    for _ in range(40):
        x = round(margin + rng.random() * (1 - 2 * margin), 4)
        y = round(margin + rng.random() * (1 - 2 * margin), 4)
        if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + gap for t in things):
            return x, y
    return None


def render_scene(scene: Scene, size: int | None = None, oversample: int = 3) -> Image.Image:
    """Draw `scene` as a square RGB image, smoothed by `oversample`.

    Args:
        scene: what to draw.
        size: side in pixels, that of its world where None.
        oversample: how many times finer it is drawn first.
    """
    side = (size or scene.world.side) * oversample
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    rng = random.Random(scene.paint_seed)
    for thing in scene.things:
        base = COLOURS[thing.colour]
        fill = tuple(max(0, min(255, c + int(rng.random() * 21) - 10)) for c in base)
        _draw_shape(draw, thing, side, fill)
        if thing.word:
            _draw_word(draw, thing, side, base)
    return image.reduce(oversample) if oversample > 1 else image


def render_owners(scene: Scene) -> Image.Image:
    """Draw each pixel's object as a number: 0 is the background, i + 1 is `scene.things[i]`."""
    size = scene.world.side
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


def _draw_word(draw: ImageDraw.ImageDraw, thing: Thing, side: int, base) -> None:
    ink = (20, 20, 20) if sum(base) > 380 else (250, 250, 250)
    cell = thing.radius * side * _CELLS[len(thing.word)]
    left = thing.x * side - (3 * len(thing.word) - 0.5) * cell
    top = thing.y * side - 3.5 * cell
    for place, letter in enumerate(thing.word):
        for row, bits in enumerate(GLYPHS[letter]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    x, y = left + (6 * place + column) * cell, top + row * cell
                    draw.rectangle((x, y, x + cell, y + cell), fill=ink)
