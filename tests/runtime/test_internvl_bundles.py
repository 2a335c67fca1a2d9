"""Bundles of a tiny InternVL: every back end, images of any shape, caches, plans, chats, tools."""

import re

import numpy as np
import pytest
import torch
from visistage.calib.calibrate import calibrate
from visistage.calib.plan_search.measure_plans import Origin
from visistage.calib.samples import Sample
from visistage.compile.build import make_bundle
from visistage.graphs.errors import ImageError
from visistage.graphs.progress import Progress
from visistage.runtime.engine import Engine
from visistage.runtime.session import load
from visistage.tools.explain.explanation import explain
from visistage.tools.verify.verify import verify

from ..graphs.test_internvl import picture
from ..support import tiny_internvl as tiny
from ..support.asking import asking

NEW = 12
PLAN = "visipruner:shallow=1,t=1,e=2,keep=6"
SHAPES = [(64, 48), (30, 33), (33, 30), (90, 31)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("internvl") / "tiny")


@pytest.fixture(scope="module")
def judge(folder):
    return tiny.Judge(folder)


@pytest.fixture(scope="module")
def bundles(folder):
    made = {}

    def bundle(plan="dense", target="cpu", **options):
        key = (plan, target, *options.items())
        if key not in made:
            out = folder.parent / "engines"
            made[key] = make_bundle(str(folder), plan=plan, target=target, out=out, **options)
        return made[key]

    return bundle


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
def test_answers_are_those_of_transformers(bundles, judge, target):
    with load(bundles(target=target).path) as session:
        for seed, shape in enumerate(SHAPES):
            image = picture(*shape, seed)
            wanted, _ = judge.answer(asking("What is it?"), [image], NEW)
            answer = session.infer(image, "What is it?", max_tokens=NEW)
            assert list(answer.tokens) == wanted[: len(answer.tokens)]
            rows = session.bundle.manifest.config.layout(image.height, image.width).rows
            assert answer.plan.visual_tokens == rows
        two = [picture(*SHAPES[0], 0), picture(*SHAPES[1], 1)]
        wanted, logits = judge.answer(asking("Both?", 2), two, NEW)
        ours = session.score(two, "Both?", wanted)[:NEW]
        assert np.abs(ours - logits.numpy()).max() < 1e-4 * logits.std()


def test_what_was_seen_is_not_computed_again_and_changes_nothing(bundles, judge):
    images = [picture(*shape, seed) for seed, shape in enumerate(SHAPES[:3])]
    with load(bundles(PLAN).path) as session, load(bundles(PLAN).path, cache_bytes=0) as anew:
        for words in ("One?", "Two or more?", "One?"):
            for image in (*images, images[:2]):
                answer = session.infer(image, words, max_tokens=NEW)
                fresh = anew.infer(image, words, max_tokens=NEW)
                assert answer.tokens == fresh.tokens
                assert answer.plan == fresh.plan
        opened = session.open(images[0])
        assert "vision" not in session.infer(opened, "Three?", max_tokens=1).timings.graphs_ms


def test_a_plan_keeps_k_of_a_large_image_and_all_of_a_small_one(bundles):
    with load(bundles(PLAN).path) as session:
        large = session.infer(picture(*SHAPES[0]), "Why?", max_tokens=2).plan
        small = session.infer(picture(*SHAPES[1]), "Why?", max_tokens=2).plan
    assert (large.visual_tokens, len(large.kept)) == (52, 6)
    assert (small.visual_tokens, len(small.kept)) == (4, 4)
    assert large.visual_tokens_per_layer == (52, 52, 6, 0)
    assert small.visual_tokens_per_layer == (4, 4, 4, 0)
    assert large.visual_flops < large.dense_visual_flops


def test_a_conversation_is_a_cold_one(bundles):
    image, other = picture(*SHAPES[0]), picture(*SHAPES[3])
    with load(bundles(PLAN).path) as session:
        chat = session.chat(image)
        first = chat.ask("What?", max_tokens=4)
        second = chat.ask("And this?", other, max_tokens=NEW)
        messages = [
            *asking("What?"),
            {"role": "assistant", "content": [{"type": "text", "text": first.text}]},
            *asking("And this?"),
        ]
        session.context.clear()
        cold = session.infer([image, other], messages, max_tokens=NEW)
    assert second.tokens == cold.tokens


def test_lanes_answer_as_one(bundles):
    images = [picture(*shape, seed) for seed, shape in enumerate(SHAPES)]
    with load(bundles(PLAN).path) as session:
        wanted = [session.infer(image, "Which?", max_tokens=NEW).tokens for image in images]
    with Engine(bundles(PLAN), lanes=3) as engine:
        tickets = [engine.submit(image, "Which?", max_tokens=NEW) for image in images]
        assert [ticket.wait().tokens for ticket in tickets] == wanted


def test_an_image_is_saved_with_its_size(bundles, tmp_path):
    with load(bundles(PLAN).path) as session:
        for shape in SHAPES[:2]:
            image, file = picture(*shape), tmp_path / f"{shape[0]}.safetensors"
            wanted = session.infer(image, "What?", max_tokens=NEW).tokens
            session.save_image(image, file)
            session.context.clear()
            session.visual_rows.clear()
            assert session.infer(file, "What?", max_tokens=NEW).tokens == wanted
        other = tmp_path / "other.safetensors"
        data = file.read_bytes()
        assert data.count(b'"33x30"') == 1
        other.write_bytes(data.replace(b'"33x30"', b'"48x64"'))
        with pytest.raises(ImageError, match="visual_rows"):
            session.load_image(other)


def test_a_budget_is_the_processors_own(bundles, folder, judge):
    """The most tiles that it may cut, in the manifest, the name and every cached image's key."""
    capped, whole = bundles(image_tokens=28), bundles()
    assert capped.manifest.config.visual_tokens == 28
    assert capped.path.name == "dense-fp32-cpu-images28"
    image = picture(*SHAPES[0])
    inputs = judge.processor(
        images=image,
        text=judge.processor.apply_chat_template(
            asking("What?"), add_generation_prompt=True, tokenize=False
        ),
        images_kwargs={"max_patches": 6},
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = judge.model(**inputs).logits[0, -1].numpy()
    with load(capped.path) as session, load(whole.path) as other:
        ours = session.score(image, "What?", [])[0]
        assert np.abs(ours - logits).max() < 1e-4 * logits.std()
        assert session.open(image).key != other.open(image).key


def test_verify_finds_it_right(bundles, folder):
    samples = [
        Sample(str(seed), picture(*shape, seed), "What is it?", "")
        for seed, shape in enumerate(SHAPES)
    ]
    for plan in ("dense", PLAN):
        report = verify(bundles(plan), samples, model=str(folder), max_tokens=4)
        assert report.failed is None, report.failed


def test_explain_draws_tokens_where_they_lie(bundles):
    images = [picture(*SHAPES[0]), picture(*SHAPES[1])]
    shown = explain(bundles(PLAN).path, images, "What?", dense=bundles().path, max_tokens=2)
    assert shown.facts["images"] == 2
    assert shown.facts["visual_tokens"] == 56
    assert len(re.findall("data:image/png", shown.html)) > 4
    with load(bundles(PLAN).path) as session:
        answer = session.infer(images, "What?", max_tokens=2)
    wide, square = answer.shown
    assert (wide.grid.rows, wide.grid.columns) == (6, 8)
    assert (square.grid.rows, square.grid.columns) == (2, 2)
    assert wide.kept(None).all()
    last = np.zeros(52, bool)
    last[[0, 5]] = True  # of the first tile its first token, of the second its second
    cells = wide.grid.cells(last)
    assert np.argwhere(cells).tolist() == [[0, 0], [0, 3]]
    last[:] = False
    last[48] = True  # of the whole its first token: a quarter
    assert np.argwhere(wide.grid.cells(last)).max(0).tolist() == [2, 3]


@pytest.mark.parametrize("selector", ["random", "scope", "divprune", "visionzip"])
def test_selectors_choose_among_the_rows_of_all_tiles(bundles, folder, selector):
    """By what the encoder says of patches, in blocks; the torch encoder says the same."""
    plan = "visionzip:keep=8" if selector == "visionzip" else f"dense:entry={selector}-8"
    bundle = bundles(plan)
    with load(bundle.path) as session:
        large = session.infer(picture(*SHAPES[0]), "Why?", max_tokens=2).plan
        small = session.infer(picture(*SHAPES[1]), "Why?", max_tokens=2).plan
    assert (large.visual_tokens, len(large.kept)) == (52, 8)
    assert (small.visual_tokens, len(small.kept)) == (4, 4)
    samples = [Sample("wide", picture(*SHAPES[0]), "What is it?", "")]
    report = verify(bundle, samples, model=str(folder), max_tokens=4)
    assert report.failed is None, report.failed


def test_a_calibration_sees_images_of_any_size(bundles, folder, tmp_path):
    """Ranges of tiles and rows as they come; integers of the weights, inputs and caches."""
    samples = [
        Sample(str(seed), picture(*shape, seed), "What is it?", "dog")
        for seed, shape in enumerate(SHAPES)
    ]
    origin = Origin(str(folder))
    found, _ = calibrate(origin, samples, PLAN, files=["x"], out=tmp_path, progress=Progress())
    bundle = bundles(PLAN, precision="int8:cache=int8", calibration=found)
    report = verify(bundle, samples, model=str(folder), calibration=found, max_tokens=4)
    assert report.failed is None, report.failed
