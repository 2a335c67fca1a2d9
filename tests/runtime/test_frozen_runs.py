"""Plans that freeze rows in the runtime: every back end, cached images, and prompts without one."""

from dataclasses import replace

import pytest
import torch
from visistage.compile.build import make_bundle
from visistage.compile.planfile import plan_to_yaml
from visistage.graphs.plan.stages import Frozen
from visistage.graphs.presets.presets import preset
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.staged import Staged

pytest.importorskip("onnxruntime")

NEW, LAYERS = 12, 6
FROZEN = (
    (Frozen("visual", "attention", (0, 1)), Frozen("visual", "mlp", (1,))),
    (Frozen("prefix", "attention", (3, 4)), Frozen("prefix", "mlp", (4,))),
)


def frozen_plan():
    """Frozen rows on both sides of a selection."""
    plan = preset("fastv", LAYERS, 16, k=3, r=0.5)
    stages = [replace(own, frozen=rows) for own, rows in zip(plan.stages, FROZEN, strict=True)]
    return replace(plan, stages=tuple(stages), name="frozen")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    built = {}

    def get(target="cpu"):
        if target not in built:
            out = tmp_path_factory.mktemp("engines")
            (out / "plan.yaml").write_text(plan_to_yaml(frozen_plan()))
            plan = str(out / "plan.yaml")
            built[target] = make_bundle(str(checkpoint), plan=plan, target=target, out=out)
        return built[target]

    return get


def ask(session, image, question="What is it?"):
    session.eos = frozenset()
    return list(session.infer(image, question, max_tokens=NEW).tokens)


@pytest.mark.parametrize("target", ["cpu", "cpu-portable", "openvino"])
def test_every_lowering_answers_as_torch_does(checkpoint, bundles, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    judge = Staged(checkpoint, bundles(target).manifest.plan, torch.float32)
    wanted = [judge.answer(picture(seed), "What is it?", NEW)[0] for seed in (1, 2)]
    with load(bundles(target).path) as session:
        assert [ask(session, picture(seed)) for seed in (1, 2)] == wanted
        assert session.context.prefix.ids  # its cache is of frozen rows


def test_an_image_that_was_seen_answers_as_a_new_one(bundles):
    with load(bundles().path) as session:
        ask(session, picture(1), "And how many?")
        ask(session, picture(2))
        warm = ask(session, picture(1))
    with load(bundles().path) as session:
        assert ask(session, picture(1)) == warm


def test_rows_before_no_image_are_not_frozen(checkpoint, bundles, tmp_path):
    """Without an image a prompt is what the model itself makes of it."""
    dense = make_bundle(str(checkpoint), plan="dense", target="cpu", out=tmp_path)
    with load(dense.path) as session:
        wanted = ask(session, [], "Say something.")
    with load(bundles().path) as session:
        assert ask(session, [], "Say something.") == wanted
