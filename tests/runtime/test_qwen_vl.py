"""Bundles of Qwen3-VL against transformers: pictures of several shapes, in every lowering."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.graphs.modules.quantized import SCALE
from visistage.runtime.image.image import load_image, prepare
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.runtime.session import load
from visistage.tests.support import calibrated, qwen, verified
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.stand_ins import stand_in, write_engines
from visistage.tools.verify.verify_report import PASSED

NEW = 16
SIZES = ((40, 64), (64, 24), (16, 16), (200, 120))  # height, width: wide, tall, least, most


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen.make_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    return built_once(checkpoint, tmp_path_factory)


@pytest.fixture(scope="module")
def judge(checkpoint):
    return qwen.Judge(checkpoint)


def shown(*numbers):
    return [picture(number, *SIZES[number]) for number in numbers]


def asked(*parts):
    """A user turn of texts and images, an image where a part is None."""
    content = [
        {"type": "image"} if part is None else {"type": "text", "text": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def answered(session, messages, images):
    session.eos = frozenset()
    return list(session.infer(images or None, messages, max_tokens=NEW).tokens)


CONVERSATIONS = {
    "wide": (asked(None, "What is this?"), (0,)),
    "tall": (asked(None, "What is this?"), (1,)),
    "least": (asked(None, "How many?"), (2,)),
    "most": (asked(None, "How many?"), (3,)),
    "text before": (asked("Look at it.", None, "What is this?"), (0,)),
    "two": (asked(None, "and", None, "Which one is larger?"), (0, 1)),
    "system": ([{"role": "system", "content": "Be brief."}, *asked(None, "What?")], (1,)),
    "none": (asked("Say something."), ()),
}


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_the_processor(checkpoint, judge, size):
    opened = open_checkpoint(str(checkpoint))
    steps = Preprocessing.from_files(None, opened.json("preprocessor_config.json"))
    layout = opened.config.layout(*size)
    image = picture(5, *size)
    mine = prepare(load_image(image), steps, layout)
    theirs = judge.images(image, return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [[1, *layout.grid]]
    frames = theirs["pixel_values"].reshape(len(mine), 3, 2, -1)
    assert np.abs(frames - mine.reshape(len(mine), 3, 1, -1)).max() < 1e-6
    by_row = prepare(load_image(image), steps, replace(layout, merge=1))
    assert np.abs(by_row - mine).max() > 0.1


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
def test_a_dense_bundle_equals_transformers(bundles, judge, target):
    with load(bundles("dense", target).path) as session:
        for name, (messages, images) in CONVERSATIONS.items():
            wanted, _ = judge.answer(messages, shown(*images), NEW)
            assert answered(session, messages, shown(*images)) == wanted, name
            assert len(set(wanted)) >= 6, name


PRUNED = "visipruner:shallow=1,t=1,e=3,keep=5"
QUESTION, OTHER = "What is this?", "And what is beside it, on the left?"


def error(found, wanted):
    return float((np.abs(found - wanted).max(-1) / wanted.std(-1)).max())


def test_logits_are_those_of_transformers(bundles, judge):
    """Compare the prompt and each step, with two images of different shapes too."""
    messages, images = CONVERSATIONS["two"]
    tokens, wanted = judge.answer(messages, shown(*images), NEW)
    with load(bundles("dense").path) as session:
        found = session.score(shown(*images), messages, tokens[:-1])
    assert error(found, wanted.numpy()) < 1e-4


@pytest.mark.parametrize("plan", ["dense", PRUNED, "v2drop:before=1-3,keep=8-5"])
def test_images_are_paid_once(bundles, plan, tmp_path):
    """Questions in turn, pictures beside others and from a file, as if all were new."""
    one, two = shown(0, 1)
    file, path = tmp_path / "image.safetensors", bundles(plan).path
    asked_of = [
        (one, QUESTION),
        (two, QUESTION),
        (one, OTHER),
        ([two, one], QUESTION),
        (one, OTHER),
    ]
    with load(path, cache_bytes=0) as anew, load(path) as session, load(path) as loaded:
        session.save_image(one, file)
        saved = loaded.load_image(file)
        for images, question in asked_of:
            wanted = anew.score(images, question, [7, 8])
            assert error(session.score(images, question, [7, 8]), wanted) < 2e-4
            given = saved if images is one else [two, saved] if images is not two else two
            assert error(loaded.score(given, question, [7, 8]), wanted) < 2e-4


def test_a_chat_goes_on_as_transformers_does(bundles, judge):
    images = shown(0)
    with load(bundles("dense").path) as session:
        session.eos = frozenset()
        chat = session.chat(images[0])
        first = chat.ask(QUESTION, max_tokens=6)
        second = chat.ask(OTHER, max_tokens=NEW)
        wanted, _ = judge.answer(
            [
                *asked(None, QUESTION),
                {"role": "assistant", "content": [{"type": "text", "text": first.text}]},
                *asked(OTHER),
            ],
            images,
            NEW,
        )
    assert list(second.tokens) == wanted


@pytest.mark.parametrize(("plan", "target"), [(PRUNED, "cpu"), (PRUNED, "cpu-portable")])
def test_a_bundle_is_verified(bundles, plan, target):
    """Every graph, and answers with a selection, against torch stages over the checkpoint."""
    report = verified.run(bundles(plan, target), count=1)
    assert report.failed is None, verified.failing(report)


@pytest.mark.parametrize("plan", ["dense", PRUNED])
def test_a_device_takes_rows_with_three_positions(checkpoint, tmp_path, monkeypatch, plan):
    made = make_bundle(str(checkpoint), plan=plan, out=tmp_path, target="rtx", contexts=(128,))
    bundle = write_engines(made)
    with load(bundle.path, backend="onnxruntime", cache_bytes=0) as session:
        wanted = [session.score(image, QUESTION, range(9, 17)) for image in shown(0, 1)]
    stand_in(monkeypatch)
    with load(bundle.path) as session:
        for image, own in zip(shown(0, 1), wanted, strict=True):
            assert error(session.score(image, QUESTION, range(9, 17)), own) < 2e-2  # FP16


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_older_families_answer_as_transformers_does(family, tmp_path):
    """Chunked axes, biases, windows, in both lowerings; a selection against torch stages."""
    path = qwen.make_checkpoint(tmp_path / "toy", family)
    judge = qwen.Judge(path)
    for target in ("cpu", "cpu-portable"):
        with load(
            make_bundle(str(path), plan="dense", target=target, out=tmp_path).path
        ) as session:
            for name in ("wide", "tall", "two", "text before"):
                messages, images = CONVERSATIONS[name]
                wanted, logits = judge.answer(messages, shown(*images), NEW)
                found = session.score(shown(*images), messages, wanted[:-1])
                assert error(found, logits.numpy()) < 1e-4, name
                assert answered(session, messages, shown(*images)) == wanted, name
    bundle = make_bundle(str(path), plan="visipruner:shallow=1,t=1,e=2,keep=5", out=tmp_path)
    report = verified.run(bundle, count=1)
    assert report.failed is None, verified.failing(report)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_integers_are_verified(family, tmp_path):
    """Every linear layer of encoder, mergers and decoder is ranged and rounded."""
    path = qwen.make_checkpoint(tmp_path / "toy", family)
    known = calibrated.calibrate(path, "dense", tmp_path / "calibration")
    assert {group.split(".")[0] for group in known.groups} == {"visual", "model", "lm_head"}
    given = {"precision": "int8", "calibration": tmp_path / "calibration"}
    bundle = make_bundle(str(path), plan="dense", out=tmp_path, **given)
    report = verified.run(bundle, count=1)
    assert report.failed is None, verified.failing(report)
    for fact in bundle.manifest.graphs.values():  # as TensorRT numbers layers that it makes of one
        graph = onnx.load(bundle.file(fact.file), load_external_data=False).graph
        names = {node.name for node in graph.node}
        numbered = [name.rpartition("_") for name in names]
        assert not [name for name, _, end in numbered if end.isdigit() and name in names]


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_weights_alone_are_verified(checkpoint, tmp_path, precision):
    """In every layer, and a graph that restores one layer by the scales of another is noticed."""
    bundle = make_bundle(str(checkpoint), plan=PRUNED, out=tmp_path, precision=precision)
    report = verified.run(bundle, count=1, model=str(checkpoint))
    assert report.failed is None, verified.failing(report)
    found = verified.statuses(report)
    assert {found[name] for name in ("weights", "quantisation", "answers")} == {PASSED}

    def change(graph):
        gate, up = (f"model.layers.0.mlp.{name}_proj.{SCALE[precision]}" for name in ("gate", "up"))
        readers = [node for node in graph.node if gate in node.input]
        assert readers
        for node in readers:
            node.input[list(node.input).index(gate)] = up

    spoilt = verified.run(verified.change_graph(bundle, "stage0.onnx", change), count=1)
    assert verified.failing(spoilt)[0] == "graph stage0"
