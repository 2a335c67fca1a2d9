"""Each entry selector chooses what its rule says, written slowly; planted mistakes are noticed."""

import hashlib
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from visistage.graphs.modules.readings import cosines
from visistage.graphs.selectors import arithmetic
from visistage.graphs.selectors.divprune import farthest
from visistage.graphs.selectors.entry import READINGS, EncoderReadings
from visistage.graphs.selectors.registry import COUNTING_SELECTORS, ENTRY_SELECTORS
from visistage.graphs.selectors.scope import covering
from visistage.graphs.selectors.visionzip import means

from ..support import reference_selectors as reference

DIGEST = hashlib.sha256(b"an image").hexdigest()


def readings(features, saliency, keys=None, class_row=True):
    features = np.asarray(features, np.float32)
    keys = features[:, ::-1] if keys is None else keys
    first = np.linspace(-1, 1, features.shape[1], dtype=np.float32) if class_row else None
    similarity = cosines(torch.from_numpy(features)[None])[0].numpy()
    return EncoderReadings(
        features=features,
        similarity=similarity,
        row_similarity=similarity,
        vocabulary=np.arange(3 * len(features)).reshape(-1, 3) % 7,
        class_row=first,
        saliency=np.asarray(saliency, np.float32),
        keys=np.ascontiguousarray(keys, np.float32),
        rows=features,
        image=DIGEST,
    )


def drawn(seed, patches, width, groups=0, class_row=True):
    """Rows without a tie; those of a group resemble each other, as patches of one thing do."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(patches, width))
    if groups:
        features = rng.normal(size=(groups, width))[rng.integers(groups, size=patches)]
        features += 0.4 * rng.normal(size=(patches, width))
    keys = rng.normal(size=(patches, width // 2))
    return readings(features, rng.exponential(size=patches), keys, class_row)


def tied(seed, patches, zeros=0, repeats=1):
    """Rows with many ties, and numbers that every order of summation gives exactly."""
    rng = np.random.default_rng(seed)
    features = rng.choice([-1.0, 1.0], size=(patches // repeats, 16))
    features = np.repeat(features, repeats, 0)[rng.permutation(patches)]
    features[rng.permutation(patches)[:zeros]] = 0
    keys = rng.choice([-1.0, 1.0], size=(patches, 4))
    keys[rng.permutation(patches)[:zeros]] = 0
    return readings(features, rng.choice([0, 0.25, 0.5, 1], size=patches), keys)


IMAGES = {
    "drawn": drawn(0, 48, 16),
    "like patches": drawn(1, 144, 32, groups=12),
    "few groups": drawn(2, 100, 24, groups=4),
    "no class row": drawn(3, 64, 16, class_row=False),
    "tied": tied(4, 96),
    "repeated": tied(5, 96, repeats=2),
    "zeros": tied(6, 40, zeros=8),
    "all alike": readings(np.ones((30, 16)), np.ones(30)),
    "all zero": readings(np.zeros((30, 16)), np.zeros(30)),
    "two patches": drawn(7, 2, 8),
    "one patch": drawn(8, 1, 8),
}


def keeps(patches):
    """Counts to keep, from one row to all."""
    return sorted({1, 2, patches // 3, patches - 1, patches} & set(range(1, patches + 1)))


@cache
def expected(rule, image, keep):
    """The answer of a rule of the reference, which takes its time."""
    return rule(IMAGES[image], keep)


def disagreements(selector, rule):
    """Images and counts where a selector's rows are not the rule's."""
    wrong = []
    for name, given in IMAGES.items():
        for keep in keeps(len(given.features)):
            index, features = expected(rule, name, keep)
            try:
                with np.errstate(invalid="raise", divide="raise", over="raise"):
                    found = selector.choose(only(given, selector.reads), keep)
            except FloatingPointError as error:
                wrong.append(f"{name}, keep {keep}: {error}")
                continue
            same = found.index.dtype == np.int64 and found.index.tolist() == index
            if features is None:
                same &= found.features is None
            elif same:
                same = found.features.dtype == np.float32
                same &= np.allclose(found.features, features, atol=1e-5)
            wrong += [] if same else [f"{name}, keep {keep}"]
    return wrong


def only(given, names):
    """The readings of these names; the count of patches must come from somewhere."""
    names = names or ("features",)
    return replace(given, **{name: None for name in READINGS if name not in names})


@pytest.mark.parametrize("name", reference.RULES)
def test_a_selector_follows_its_rule(name):
    assert disagreements(ENTRY_SELECTORS[name], reference.RULES[name]) == []


@pytest.mark.parametrize("name", COUNTING_SELECTORS)
def test_every_answer_is_of_its_kind(name):
    selector = ENTRY_SELECTORS[name]
    assert selector.name == name
    assert set(selector.reads) <= set(READINGS)
    for given in IMAGES.values():
        patches = len(given.features)
        before = {key: np.copy(value) for key, value in vars(given).items()}
        for keep in keeps(patches):
            found, again = selector.choose(given, keep), selector.choose(given, keep)
            assert found.index.shape == (keep,)
            assert found.index.dtype == np.int64
            assert (np.diff(found.index) > 0).all()
            assert found.index[-1] < patches
            first = -1 if selector.needs_renumbering and given.class_row is not None else 0
            assert found.index[0] >= first
            assert found.index.tolist() == again.index.tolist()
            if found.features is not None:
                assert np.isfinite(found.features).all()
                assert np.array_equal(found.features, again.features)
        assert all(np.array_equal(value, vars(given)[key]) for key, value in before.items())


def test_cosines_are_those_of_every_pair():
    rows = np.random.default_rng(3).normal(size=(9, 5)).astype(np.float32)
    rows[4] = 0
    found = cosines(torch.from_numpy(rows)[None])[0].numpy()
    np.testing.assert_allclose(found, reference.cosines(rows), atol=1e-6)


def golden():
    def t(shape, w, b):
        return np.sin(w * (np.arange(np.prod(shape)) + 1.0) + b).reshape(shape)

    features = t((8, 4), 0.9, 0.3) + 0.2 * t((8, 4), 2.3, 0.1)
    return readings(features, np.abs(t((8,), 1.7, 0.4)), features)


def test_golden_vectors():
    """Made once with other code than the selectors' and the reference's."""
    given = golden()
    s = given.similarity.copy()
    a = "0.863209 0.611858 0.705540 0.793668 0.501021 0.922775 0.263232 0.990607"
    assert " ".join(f"{value:.6f}" for value in given.saliency) == a
    scope, divprune = [7, 1, 2, 5, 3, 4, 6, 0], [5, 6, 2, 3, 4, 7, 1, 0]
    assert covering(s, given.saliency, 8).tolist() == scope
    assert reference.scope_order(reference.cosines(given.features), given.saliency, 8) == scope
    assert farthest(s, 8).tolist() == divprune
    assert reference.divprune_order(reference.cosines(given.features), 8) == divprune
    assert arithmetic.largest(given.saliency, 3).tolist() == [0, 5, 7]
    rows = [[-1.282037, -1.289496, -0.610414, 0.972819], [0.306179, 0.427557, 0.288145, -0.183498]]
    targets, others = np.array([1, 3]), np.array([2, 4, 6])
    merged = given.features[targets] + means(given, targets, others)
    assert np.allclose(merged, rows, atol=1e-6)
    slow = reference.merged_rows(given.features, given.keys, [0, 5, 7], 2)
    assert list(slow) == [1, 3]
    assert np.allclose(list(slow.values()), rows, atol=1e-6)


@pytest.mark.parametrize("class_row", [True, False])
@pytest.mark.parametrize(("published", "salient", "merged"), [(64, 54, 10), (128, 108, 20)])
def test_visionzip_divides_its_rows_as_published(class_row, published, salient, merged):
    given = drawn(9, 192, 16, class_row=class_row)
    found = ENTRY_SELECTORS["visionzip"].choose(given, published + class_row)
    as_is = [
        j
        for j, row in zip(found.index, found.features, strict=True)
        if j >= 0 and np.array_equal(row, given.features[j])
    ]
    assert as_is == arithmetic.largest(given.saliency, salient).tolist()
    assert len(found.index) == salient + merged + class_row
    assert (found.index[0] == -1) == class_row


@pytest.mark.parametrize("keep", [64, 192])
def test_the_cover_is_the_plain_loops_bit_for_bit(keep):
    """At the real count, where scores lie close: bounds must not change one choice."""
    given = drawn(10, 576, 64, groups=40)
    s, a = given.similarity, given.saliency
    covered, plain = np.zeros_like(a), []
    for _ in range(keep):
        gains = np.maximum(s - covered, 0).sum(1) * a
        gains[plain] = -1
        plain.append(int(gains.argmax()))
        covered = np.maximum(covered, s[plain[-1]])
    assert covering(s, a, keep).tolist() == plain


PINNED = [20, 51, 57, 61, 85, 94, 100, 104, 112, 115, 132, 143]


def faults(selector):
    """What is wrong with rows by chance."""
    image, same, other = (drawn(seed, 144, 8) for seed in (11, 12, 13))
    other = replace(other, image=hashlib.sha256(b"another image").hexdigest())
    few, many = (selector.choose(image, keep).index.tolist() for keep in (12, 72))
    np.random.seed(1)
    facts = {
        "an image has other rows than in the version before": few == PINNED,
        "a session has other rows of an image": selector.choose(same, 12).index.tolist() == few,
        "images share their rows": selector.choose(other, 12).index.tolist() != few,
        "not ascending, or doubled": many == sorted({*many}) and len(many) == 72,
        "few are not among many": {*few} < {*many},
        "one half is preferred": 24 < sum(row < 72 for row in many) < 48,
    }
    return [name for name, holds in facts.items() if not holds]


def test_chance_follows_the_image_and_nothing_else():
    assert faults(ENTRY_SELECTORS["random"]) == []


MISTAKES = [
    ("scope", "wrong tie", "(bounds.argmax())", "(len(bounds) - 1 - bounds[::-1].argmax())"),
    ("scope", "wrong tie in a block", "np.sort(order[:BLOCK])", "np.sort(order[:BLOCK])[::-1]"),
    ("scope", "tie with a row outside", "found[at] <= limit", "found[at] < limit"),
    ("scope", "m not updated", "np.maximum(covered, similarity[row])", "covered"),
    ("scope", "m not updated in a block", "np.maximum(covered, tile[at])", "covered"),
    ("scope", "m replaced", "np.maximum(covered, similarity[row])", "similarity[row]"),
    ("scope", "negative cosines", "np.zeros_like(saliency)", "np.full_like(saliency, -1)"),
    ("scope", "signs lost", "np.maximum(tile, covered)", "np.maximum(abs(tile), covered)"),
    ("scope", "gains not cut at 0", "np.maximum(tile, covered)", "tile.copy()"),
    ("scope", "no saliency", "uncovered.sum(1) * weights", "uncovered.sum(1)"),
    ("scope", "block never left", "found[at] <= limit", "found[at] <= 0"),
    ("scope", "old bounds believed", "bounds[rivals] = gains", "_ = gains"),
    ("scope", "equal rivals", "bounds >= found[at]", "bounds > found[at]"),
    ("scope", "chosen twice", "bounds[chosen] = -1", "pass"),
    ("scope", "order of choice", "np.sort(covering", "(covering"),
    ("divprune", "nearest", "nearest.argmin()", "nearest.argmax()"),
    ("divprune", "wrong tie", "nearest.argmin()", "len(nearest) - 1 - nearest[::-1].argmin()"),
    ("divprune", "own neighbour", "np.fill_diagonal(similarity, -np.inf)", "pass"),
    ("divprune", "first by the middle", "similarity.max(0)", "similarity.sum(0)"),
    ("divprune", "only the last chosen", "np.maximum(nearest, similarity[row])", "similarity[row]"),
    ("divprune", "farthest chosen", "np.maximum(nearest,", "np.minimum(nearest,"),
    ("cls", "smallest", "largest(given.saliency", "largest(-given.saliency"),
    ("visionzip", "no class row", "given.class_row is not None", "False"),
    ("visionzip", "class row counted twice", "else keep - 1", "else keep"),
    ("visionzip", "share", "10 / 64", "10 / 54"),
    ("visionzip", "mean over wrong rows", "goes @ given.features[others]", "goes @ WRONG"),
    ("visionzip", "sum", "np.maximum(goes.sum(1, keepdims=True), 1)", "1"),
    ("visionzip", "target not counted", "targets)] += means", "targets)] = means"),
    ("visionzip", "neighbours as targets", "rest[:: max(1, len(rest) // max(1, merged))]", "rest"),
    ("visionzip", "least similar", ".argmax(1)", ".argmin(1)"),
    ("visionzip", "longest key", "np.divide(keys, lengths,", "np.divide(keys, 1,"),
    ("visionzip", "features for keys", "given.keys[others] @ keys.T", "LIKE"),
    ("uniform", "ceiling", "* given.patches // keep", "* -given.patches // keep * -1"),
    ("uniform", "first ones", "* given.patches // keep", ""),
    ("random", "no seed", "RandomState(seed)", "RandomState()"),
    ("random", "one seed", "RandomState(seed)", "RandomState(0)"),
    ("random", "doubled rows", ".permutation(count)", ".randint(count, size=72)"),
    ("random", "not sorted", "np.sort(order[:keep])", "order[:keep]"),
    ("random", "first ones", "np.sort(order[:keep])", "np.arange(keep)"),
]
WRONG = {
    "goes @ WRONG": "goes @ given.features[: len(others)]",
    "LIKE": "given.features[others] @ given.features[targets].T",
}


def planted(name, old, new):
    """The rule of a copy of its module in which ``new`` stands for ``old``."""
    copies, found = [], 0
    rule = import_module(f"visistage.graphs.selectors.{name}")
    for module in (arithmetic, rule):
        source = Path(module.__file__).read_text(encoding="utf-8")
        found += source.count(old)
        copies.append(ModuleType(module.__name__))
        copies[-1].__package__ = module.__package__
        exec(source.replace(old, WRONG.get(new, new)), vars(copies[-1]))
    assert found, f"{rule.__name__} has no {old!r} any more"
    shared, copy = map(vars, copies)
    copy |= {step: shared[step] for step in ("largest",) if step in copy}
    return SimpleNamespace(choose=copy["choose"], reads=ENTRY_SELECTORS[name].reads)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(name, old, new) for name, _, old, new in MISTAKES],
    ids=[f"{name}: {what}" for name, what, _, _ in MISTAKES],
)
def test_a_planted_mistake_is_noticed(name, old, new):
    selector = planted(name, old, new)
    if name == "random":
        assert faults(selector)
    else:
        assert disagreements(selector, reference.RULES[name])
