"""Questions about a scene, each with the one answer that the scene allows.

A phrase for an object fits no other object ("the star" where there is one star). Answers are
balanced where wording alone could give them away: yes against no, left against right.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from itertools import product

from .scenes import COLOURS, LETTERS, SHAPES, Scene, Thing, pick
from .worlds import World

_CLEAR = 0.07  # least distance of a centre from a dividing line that is asked about


@dataclass(frozen=True)
class Question:
    """One question in words, its answer and kind, the things it is about, and what it calls them.

    `names` are phrases of the text, in the order of `about` where each names one thing; the noun of
    a count, and what is asked to exist, may name any number.
    """

    text: str
    answer: str
    kind: str
    about: tuple[Thing, ...] = ()
    names: tuple[str, ...] = ()


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """Return a question of `kind` about `scene`, or None where the scene allows none."""
    made = _MAKERS[kind](scene, rng)
    return None if made is None else Question(made[0], made[1], kind, *map(tuple, made[2:]))


def ask_any(scene: Scene, rng: random.Random, kinds: tuple[str, ...] | None = None) -> Question:
    """Return a question of a kind drawn from `kinds` (all where None), trying until one fits."""
    while True:
        question = ask(scene, pick(rng, kinds or KINDS), rng)
        if question is not None:
            return question


def referring(scene: Scene, thing: Thing, without: str = "", sized: bool = True) -> list[str]:
    """Return the noun phrases (without article) that fit `thing` and nothing else in `scene`.

    Args:
        scene: the scene.
        thing: one of its objects.
        without: the attribute that the phrase must not name: "colour", "shape" or "size".
        sized: whether phrases may say the size.
    """
    phrases = []
    for names in scene.world.phrases:
        if without in names or ("size" in names and not sized):
            continue
        same = [t for t in scene.things if all(getattr(t, n) == getattr(thing, n) for n in names)]
        if len(same) == 1:
            words = [getattr(thing, n) for n in names]
            phrases.append(" ".join(words if "shape" in names else [*words, "object"]))
    return phrases


def _target(scene: Scene, rng: random.Random, without: str = "", things=None):
    """Draw an object that can be singled out, with a phrase for it."""
    able = [(t, p) for t in things or scene.things if (p := referring(scene, t, without))]
    if not able:
        return None
    thing, phrases = pick(rng, able)
    return thing, pick(rng, phrases)


def _colour(scene: Scene, rng: random.Random):
    found = _target(scene, rng, without="colour")
    if found is None:
        return None
    thing, name = found
    forms = (
        "What color is the {}?",
        "Which color does the {} have?",
        "Tell me the color of the {}.",
    )
    return pick(rng, forms).format(name), thing.colour, [thing], [name]


def _shape(scene: Scene, rng: random.Random):
    found = _target(scene, rng, without="shape")
    if found is None:
        return None
    thing, name = found
    forms = (
        "What shape is the {}?",
        "Which shape does the {} have?",
        "What is the shape of the {}?",
    )
    return pick(rng, forms).format(name), thing.shape, [thing], [name]


def _values(world: World) -> dict[str, list[str]]:
    """Return every value of each attribute."""
    return {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(world.radii)}


def _count(scene: Scene, rng: random.Random):
    about, found, words = pick(rng, scene.world.counted), list(scene.things), ["object"]
    if about:
        tally = Counter(tuple(getattr(t, name) for name in about) for t in scene.things)
        wanted = bisect(scene.world.tallies, rng.random())
        most = len(scene.world.tallies)
        values = list(product(*(_values(scene.world)[name] for name in about)))
        fitting = [v for v in values if min(tally[v], most) == wanted]
        if len(about) > 1 and not wanted:  # each of its words fits something that is there
            seen = [set(column) for column in zip(*tally, strict=True)]
            fitting = [v for v in fitting if all(map(set.__contains__, seen, v))]
        value = pick(rng, fitting or [v for v in values if tally[v]])
        words = [*value] if "shape" in about else [*value, "object"]
        found = [t for t in found if tuple(getattr(t, name) for name in about) == value]
    noun = f"{' '.join(words)}s".replace("crosss", "crosses")
    forms = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
    return pick(rng, forms).format(noun), str(len(found)), found, [noun]


def _yes_no(scene: Scene, rng: random.Random):
    wanted = rng.random() < 0.5
    about = pick(rng, ("exists", "colour", "shape", "size"))
    if about == "exists":
        made = _existence(scene, rng, wanted)
    else:
        made = _attribute(scene, rng, about, wanted)
    return None if made is None else (made[0], "yes" if wanted else "no", *made[1:])


def _existence(scene: Scene, rng: random.Random, wanted: bool):
    pairs = {(t.colour, t.shape) for t in scene.things}
    if wanted:
        colour, shape = pick(rng, sorted(pairs))
    else:
        near = [(a.colour, b.shape) for a in scene.things for b in scene.things]
        near = [p for p in near if p not in pairs]
        far = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
        colour, shape = pick(rng, near if near and rng.random() < 0.6 else far)
    article = "an" if colour == "orange" else "a"
    forms = ("Is there {} {} {}?", "Do you see {} {} {}?", "Does the picture show {} {} {}?")
    found = [t for t in scene.things if (t.colour, t.shape) == (colour, shape)]
    return pick(rng, forms).format(article, colour, shape), found, [f"{colour} {shape}"]


def _attribute(scene: Scene, rng: random.Random, about: str, wanted: bool):
    found = _target(scene, rng, without=about)
    if found is None:
        return None
    thing, name = found
    value = getattr(thing, about)
    if not wanted:
        values = _values(scene.world)[about]
        present = [getattr(t, about) for t in scene.things if getattr(t, about) != value]
        absent = [v for v in values if v != value]
        value = pick(rng, present if present and rng.random() < 0.5 else absent)
    text = f"Is the {name} a {value}?" if about == "shape" else f"Is the {name} {value}?"
    return text, [thing], [name]


def _position(scene: Scene, rng: random.Random):
    clear = [t for t in scene.things if min(abs(t.x - 0.5), abs(t.y - 0.5)) > _CLEAR]
    found = _target(scene, rng, things=clear) if clear else None
    if found is None:
        return None
    thing, name = found
    forms = ("Where is the {}?", "In which corner is the {}?", "Where do you see the {}?")
    answer = f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"
    return pick(rng, forms).format(name), answer, [thing], [name]


def _relation(scene: Scene, rng: random.Random):
    able = [(t, p) for t in scene.things if (p := referring(scene, t, sized=False))]
    if len(able) < 2:
        return None
    (one, phrases), (other, others) = pick(rng, able), pick(rng, able)
    across = rng.random() < 0.5
    apart = one.x - other.x if across else one.y - other.y
    if abs(apart) <= _CLEAR + 0.03:
        return None
    text = "Is the {} left or right of the {}?" if across else "Is the {} above or below the {}?"
    words = ("left", "right") if across else ("above", "below")
    names = [pick(rng, phrases), pick(rng, others)]
    return text.format(*names), words[apart > 0], [one, other], names


def _reading(scene: Scene, rng: random.Random):
    printed = [t for t in scene.things if t.word]
    found = _target(scene, rng, things=printed) if printed else None
    if found is None:
        return None
    thing, name = found
    return pick(rng, scene.world.reading).format(name), thing.word, [thing], [name]


_MAKERS = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "yes/no": _yes_no,
    "position": _position,
    "relation": _relation,
    "reading": _reading,
}
KINDS = tuple(_MAKERS)
ANSWERS = (
    *COLOURS,
    *SHAPES,
    *map(str, range(7)),
    *("yes", "no", "top left", "top right", "bottom left", "bottom right"),
    *("left", "right", "above", "below"),
    *LETTERS,
)
