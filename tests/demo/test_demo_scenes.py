"""The demo's scenes and questions: repeatable, rightly answered, and nothing held out leaks."""

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pytest
from visistage.demo.gallery import bundled
from visistage.demo.heldout import blind_accuracy, held_out
from visistage.demo.questions import ANSWERS, KINDS, ask, ask_any
from visistage.demo.scenes import COLOURS, SHAPES, is_held_out, make_scene, render_scene
from visistage.demo.worlds import CROWDED, DEMO, WORLDS

WORDS = {"colour": set(COLOURS), "shape": set(SHAPES), "size": set(CROWDED.radii)}
SERIES = "c4c8173b6ebd972301999cfb2f7e7f1ad49e3834cf0c2578169d086f3a737e8f"
"""Hash of the first questions of the demo's held-out series 0, which measurements are made with."""

worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))


def samples(count=2100, seed=5, world=DEMO):
    """Scenes with questions, as `held_out` has them, but without drawing anything."""
    rng = random.Random(seed)
    for index in range(count):
        question = None
        while question is None:
            scene = make_scene(rng, held_out=True, world=world)
            question = ask(scene, KINDS[index % len(KINDS)], rng)
        yield scene, question


def matches(scene, phrase):
    """The things that every attribute word in `phrase` fits (plurals count as their singular)."""
    words = [re.sub(r"(?<=cross)es$|(?<!cros)s$", "", w) for w in phrase.strip(" ?.").split()]
    found = list(scene.things)
    for attribute, known in WORDS.items():
        for word in words:
            if word in known:
                found = [t for t in found if getattr(t, attribute) == word]
    return found


def the_one(scene, phrase):
    found = matches(scene, phrase)
    assert len(found) == 1, (phrase, scene)
    return found[0]


def answer(scene, text):
    """An answer worked out from the words alone, by other means than the generator's."""
    if m := re.match(r"Is the (.+) (left|above) or (right|below) of the (.+)\?", text) or re.match(
        r"Is the (.+) (above) or (below) the (.+)\?", text
    ):
        one, other = the_one(scene, m[1]), the_one(scene, m[4])
        first = one.x < other.x if m[2] == "left" else one.y < other.y
        return m[2] if first else m[3]
    if m := re.match(r"(?:How many|Count the) (.+?)(?: are there| do you see)?[?.]", text):
        return str(len(matches(scene, m[1])))
    if m := re.match(r"(?:Is there|Do you see|Does the picture show) an? (.+)\?", text):
        return "yes" if matches(scene, m[1]) else "no"
    if m := re.match(r"Is the (.+?) (?:a )?(\w+)\?$", text):
        thing = the_one(scene, m[1])
        return "yes" if m[2] in (thing.colour, thing.shape, thing.size) else "no"
    if m := re.match(r"(?:Where is|In which corner is|Where do you see) the (.+)\?", text):
        thing = the_one(scene, m[1])
        return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"
    if m := re.match(r".*letter.* (?:on|does) the (.+?)(?: carry)?[?.]", text):
        return the_one(scene, m[1]).word
    attribute = "colour" if re.search("colou?r", text) else "shape"
    m = re.search(r"(?:is|of|does) the ((?!shape|color).+?)(?: have)?[?.]", text)
    return getattr(the_one(scene, m[1].removeprefix("shape of the ")), attribute)


def test_same_seed_gives_the_same_samples():
    one, other = list(held_out(30, 3)), list(held_out(30, 3))
    for a, b in zip(one, other, strict=True):
        assert (a.prompt, a.answer, a.kind, a.scene) == (b.prompt, b.answer, b.kind, b.scene)
        assert np.array_equal(a.image, b.image)
    assert [s.prompt for s in held_out(30, 4)] != [s.prompt for s in one]


def test_the_held_out_series_is_what_it_was():
    """Measurements of different days are about the same questions."""
    known = hashlib.sha256()
    for sample in held_out(280):
        things = [(t.shape, t.colour, t.size, t.x, t.y, t.word) for t in sample.scene.things]
        known.update(repr((sample.prompt, sample.answer, sample.kind, things)).encode())
    assert known.hexdigest() == SERIES


@worlds
def test_sample_has_what_a_checkpoint_needs(world):
    sample = next(held_out(1, world=world))
    assert sample.image.size == (world.side, world.side)
    assert sample.image.mode == "RGB"
    assert sample.prompt == f"USER: <image>\n{sample.question} ASSISTANT:"
    assert sample.answer in ANSWERS


@worlds
def test_answers_agree_with_an_independent_reading(world):
    for scene, question in samples(world=world):
        assert answer(scene, question.text) == question.answer, (question, scene)
        known = question.answer in ANSWERS or question.kind in ("count", "reading")
        assert known if world is CROWDED else question.answer in ANSWERS


@worlds
def test_names_are_what_the_question_calls_its_things(world):
    for scene, question in samples(350, world=world):
        assert all(name in question.text for name in question.names)
        if len(question.names) == 2:
            assert [the_one(scene, name) for name in question.names] == list(question.about)
        else:
            assert matches(scene, question.names[0]) == list(question.about)


def test_crowded_scenes_have_words_and_look_alikes():
    scenes = [scene for scene, _ in samples(140, world=CROWDED)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {len(scene.things) for scene in scenes} == set(range(8, 17))
    assert {thing.size for thing in things} == {"small", "medium", "large"}
    lengths = Counter(len(thing.word or "") for thing in things)
    assert set(lengths) == {0, 1, 2, 3}
    counted = [q for _, q in samples(700, world=CROWDED) if q.kind == "count"]
    assert sum(q.answer == "0" for q in counted) < 0.2 * len(counted)
    assert sum(len(q.about) > 1 for q in counted) > 0.3 * len(counted)


def test_kinds_come_in_equal_numbers_and_answers_are_balanced():
    tallies = {kind: Counter() for kind in KINDS}
    for _, question in samples(2100):
        tallies[question.kind][question.answer] += 1
    assert {sum(t.values()) for t in tallies.values()} == {300}
    for kind, most in (("yes/no", 0.58), ("position", 0.35), ("count", 0.4), ("colour", 0.2)):
        assert tallies[kind].most_common(1)[0][1] / 300 < most, tallies[kind]
    sides = tallies["relation"]
    assert abs(sides["left"] - sides["right"]) < 50
    assert abs(sides["above"] - sides["below"]) < 50


def test_training_never_draws_a_held_out_scene():
    rng = random.Random(0)
    assert not any(is_held_out(make_scene(rng)) for _ in range(500))
    assert all(is_held_out(sample.scene) for sample in held_out(50))


def test_wording_alone_answers_less_than_half():
    blind = blind_accuracy(count=1400, learn=4000)
    assert blind["all"] < 0.45
    assert blind["yes/no"] < 0.6
    assert blind["relation"] < 0.6


@pytest.mark.parametrize(
    ("things", "world"),
    [(2, DEMO), (3, DEMO), (4, DEMO), (5, DEMO), (6, DEMO), (8, CROWDED), (16, CROWDED)],
)
def test_things_stay_inside_and_apart(things, world):
    rng = random.Random(things)
    for _ in range(40):
        scene = make_scene(rng, things=things, world=world)
        assert len(scene.things) == things
        for t in scene.things:
            assert t.radius < t.x < 1 - t.radius
            assert t.radius < t.y < 1 - t.radius
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("size", [33, 96, 384, 500])
def test_pictures_render_at_any_size(size):
    scene = make_scene(random.Random(1))
    image = render_scene(scene, size)
    assert image.size == (size, size)
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    for t in scene.things:
        near = np.abs(pixels - np.array(COLOURS[t.colour])).max(1) < 30
        assert near.mean() > 0.004, t


def test_any_question_can_be_had_from_few_kinds():
    rng = random.Random(2)
    scene = make_scene(rng)
    assert ask_any(scene, rng, ("count",)).kind == "count"
    assert ask_any(scene, rng).kind in KINDS


def test_bundled_pictures_have_right_answers():
    images = bundled()
    assert len(images) == 4
    for image in images:
        assert image.path.stat().st_size < 40_000
        assert all(found in ANSWERS for _, found in image.questions)
