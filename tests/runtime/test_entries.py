"""Plans with an entry in the runtime: every back end, whatever is asked, and what is told of it."""

import numpy as np
import pytest
import torch
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.staged import Staged

pytest.importorskip("onnxruntime")

PLANS = ("scope:keep=6", "visionzip:keep=7", "fastv:k=3,r=0.5,entry=divprune-9", "random:keep=5")
LATE = (
    "exit-only:e=5,entry=scope-6-at3",
    "vica:layers=0-1-4,prefix=frozen",
    "vica:layers=2-3-6,prefix=updated,entry=scope-6",
    "hidrop:entry=2,edges=3-5,keep=6-2,exit=7",
    "hidrop:entry=1,edges=4,keep=5,exit=8,positions=separate",
    "hidrop:entry=2,edges=3-5,keep=6-2,exit=7,positions=renumbered",
)
NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=8, kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    return built_once(checkpoint, tmp_path_factory)


def ask(session, image, question="What is it?"):
    session.eos = frozenset()
    return session.infer(image, question, max_tokens=NEW)


@pytest.mark.parametrize("target", ["cpu-portable", "openvino"])
@pytest.mark.parametrize("plan", [*PLANS, *LATE])
def test_every_lowering_answers_as_torch_does(checkpoint, bundles, plan, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    bundle = bundles(plan, target)
    judge = Staged(checkpoint, bundle.manifest.plan, torch.float32)
    with load(bundle.path) as session:
        found = [ask(session, picture(seed)).tokens for seed in (1, 2)]
    assert [list(tokens) for tokens in found] == [
        judge.answer(picture(seed), "What is it?", NEW)[0] for seed in (1, 2)
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_no_question_has_a_say_in_what_enters(bundles, plan):
    with load(bundles(plan).path) as session, load(bundles(plan).path, cache_bytes=0) as other:
        asked = [
            ask(one, picture(1), question).shown[0].patches.tolist()
            for one, question in ((session, "What?"), (session, "How many are red?"), (other, "x"))
        ]
        another = ask(session, picture(2)).shown[0].patches.tolist()
    assert asked[0] == asked[1] == asked[2]
    assert another != asked[0]


def test_an_answer_tells_what_entered(bundles):
    """Positions after the rows of text before the image, as they were in the whole image."""
    bundle = bundles("scope:keep=6")
    with load(bundle.path) as session:
        answer = ask(session, picture(1))
        first = next(
            sum(len(part) for part in parts[:1])
            for parts in [session.prompt_parts("x", [session.decode_image(picture(1))])]
        )
    facts, patches = answer.plan, answer.shown[0].patches
    assert facts.kept == tuple(int(first + patch) for patch in patches)
    assert (facts.visual_tokens, facts.visual_tokens_per_layer) == (16, (6,) * 8)
    assert facts.trigger == facts.exit == 7
    assert int(answer.shown[0].kept(facts.kept).sum()) == 6
    assert answer.timings.graphs_ms["entry"] >= 0


def test_a_class_row_that_entered_has_no_place_in_the_picture(bundles):
    with load(bundles("visionzip:keep=7").path) as session:
        answer = ask(session, [picture(1), picture(2)])
    assert [shown.patches[0] for shown in answer.shown] == [-1, -1]
    assert [int(shown.kept(answer.plan.kept).sum()) for shown in answer.shown] == [6, 6]
    assert np.diff([shown.positions[0] for shown in answer.shown]).min() >= 7
