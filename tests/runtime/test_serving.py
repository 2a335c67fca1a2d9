"""Stages that visual rows serve: every lowering, a device, kept images, features, integers.

The torch chain is held against the obvious form in ``tests/graphs/test_vica.py``; here bundles are
held against the torch chain.
"""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from visistage.compile.build import make_bundle
from visistage.compile.export.static_shapes import compiler_peak
from visistage.graphs.bundle import Bundle
from visistage.graphs.chain.executor import observed
from visistage.graphs.plan.call_cost import question_calls, token_calls
from visistage.runtime.backends.feeds import PromptCalls
from visistage.runtime.session import load
from visistage.tests.support import calibrated, toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.staged import Staged
from visistage.tests.support.stand_ins import stand_in, write_engines
from visistage.tests.support.verified import change_graph, failing, run, statuses, swap
from visistage.tools.profile.timing import timed_calls

pytest.importorskip("onnxruntime")

QUESTION, OTHER = "What is this?", "And what is beside it, on the left?"
NEW = 9
PLAN = "vica:layers=0-1-4,prefix=frozen"
LATE = "vica:layers=2-3-6,prefix=updated,entry=scope-9"
SELECTS = "vica:layers=0-1-4,prefix=updated,drop_mlp=4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=8, kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    return built_once(checkpoint, tmp_path_factory)


def without_features(serve, stage, rows, at, first, inject):
    return serve(stage, rows, at, first, {layer: 0 * own for layer, own in inject.items()})


def error(found, wanted):
    return float((np.abs(found - wanted).max(-1) / wanted.std(-1)).max())


@pytest.mark.parametrize("target", ["cpu", "cpu-portable", "openvino"])
@pytest.mark.parametrize("plan", [PLAN, LATE, SELECTS])
def test_every_lowering_equals_torch(bundles, checkpoint, plan, target, monkeypatch):
    """The prompt and eight decode steps; the second time with the image in the cache."""
    if target == "openvino":
        pytest.importorskip("openvino")
    bundle = bundles(plan, target)
    assert "serve0" in bundle.manifest.graphs or plan == LATE
    judge = Staged(checkpoint, bundle.manifest.plan, torch.float32)
    with load(bundle.path) as session:
        for question in (QUESTION, OTHER):
            tokens, wanted, _ = judge.answer(picture(1), question, NEW)
            found = session.score(picture(1), question, tokens[:-1])
            assert error(found, wanted.numpy()) < 1e-4
        session.context.clear()
        serve = PromptCalls.serve
        monkeypatch.setattr(
            PromptCalls,
            "serve",
            lambda self, stage, rows, at, *given: serve(self, stage, rows, at + 1, *given),
        )
        assert error(session.score(picture(1), OTHER, tokens[:-1]), wanted.numpy()) > 1e-2


def test_nothing_else_runs_for_visual_rows(bundles):
    """The calls are those that estimates count on."""
    bundle = bundles(PLAN)
    plan, prefix = bundle.manifest.plan, len(bundle.manifest.prefix.ids)
    with load(bundle.path, cache_bytes=1 << 20) as session:
        session.eos = frozenset()
        for cached in (False, True):
            with timed_calls(session.executor) as events:
                session.infer(picture(1), QUESTION, max_tokens=2)
            made = [(event.call.graph, event.call.rows) for event in events]
            text = next(rows for graph, rows in made if graph == "stage0")
            sizes = {"prefix": prefix, "visual": 16, "text": text, "slots": lambda *of: 0}
            wanted = question_calls(plan, cached=cached, **sizes) + token_calls(plan, **sizes)
            assert made == [(call.graph, call.rows) for call in wanted]
            served = [rows for graph, rows in made if graph.startswith("serve")]
            assert served == ([] if cached else [16, 16])
            assert {rows for graph, rows in made if graph.startswith("stage")} == {text, 1}


@pytest.mark.parametrize("plan", [PLAN, LATE])
def test_images_of_a_file_and_beside_others_are_those_of_a_cold_run(bundles, plan, tmp_path):
    one, two, file = picture(1), picture(2), tmp_path / "image.safetensors"
    asked = [(one, QUESTION), (two, QUESTION), (one, OTHER), ([two, one], QUESTION), (one, OTHER)]
    path = bundles(plan).path
    with load(path, cache_bytes=0) as anew, load(path) as session, load(path) as loaded:
        session.save_image(one, file)
        image = loaded.load_image(file)
        for images, question in asked:
            wanted = anew.score(images, question, [7, 8])
            assert error(session.score(images, question, [7, 8]), wanted) < 2e-4
            given = image if images is one else [two, image] if images is not two else two
            assert error(loaded.score(given, question, [7, 8]), wanted) < 2e-4


@pytest.mark.parametrize(
    ("target", "precision"), [("rtx", "fp16"), ("rtx", "fp16:cache=int8"), ("orin-jp62", "fp16")]
)
def test_a_device_serves_what_the_cpu_does(checkpoint, tmp_path, monkeypatch, target, precision):
    """Stages in parts, two context lengths with one engine for what serves."""
    options = {"contexts": (128, 256), "build_memory": compiler_peak(120_000)}
    if "int8" in precision:
        calibrated.calibrate(checkpoint, PLAN, tmp_path / "calibration")
        options["calibration"] = tmp_path / "calibration"
    made = make_bundle(
        str(checkpoint), plan=PLAN, out=tmp_path, target=target, precision=precision, **options
    )
    bundle = write_engines(made)
    assert {"serve0.part0", "serve0.part1", "serve2"} <= {*bundle.manifest.graphs}
    asked = [(seed, question) for seed in (1, 2) for question in (QUESTION, OTHER)]
    with load(bundle.path, backend="onnxruntime", cache_bytes=0) as session:
        wanted = [session.score(picture(seed), text, range(9, 17)) for seed, text in asked]
    machine = stand_in(monkeypatch)
    with load(bundle.path) as session:
        for _ in range(2):
            for (seed, text), logits in zip(asked, wanted, strict=True):
                found = session.score(picture(seed), text, range(9, 17))
                # FP16; in an INT8 cache a value between two integers may go the other way.
                assert error(found, logits) < (1e-1 if "int8" in precision else 2e-2)
        runs = [(graph, rows) for graph, rows, _ in machine.api.runs]
        assert {rows for graph, rows in runs if graph.startswith("serve")} == {16}
        assert session.executor.reset_elapsed()["serve0"] > 0
        session.context.clear()
        session.executor.restore = lambda *given: None
        assert error(session.score(picture(1), QUESTION, range(9, 17)), wanted[0]) > 2e-2


def test_features_that_are_added_within_a_stage_come_along(tmp_path):
    """Layers 0, 5 and 6 of 8 get features of the encoder, all of them in stages that are served."""
    fused = toy.make_checkpoint(
        tmp_path / "fused", layers=8, kv_heads=2, encoder_layers=24, fusion=("I_D", "3-18-23")
    )
    plan = "vica:layers=0-1-2-3-4-5-6,prefix=updated"
    for target in ("cpu", "cpu-portable"):
        bundle = make_bundle(str(fused), plan=plan, target=target, out=tmp_path)
        spec = bundle.manifest.graphs["serve0"]
        assert [tensor.name for tensor in spec.inputs[2:]] == ["inject.0", "inject.5", "inject.6"]
        assert spec.outputs[0].name == "rows.out"
        judge = Staged(fused, bundle.manifest.plan, torch.float32)
        with load(bundle.path) as session:
            for question in (QUESTION, OTHER):
                tokens, wanted, _ = judge.answer(picture(1), question, NEW)
                found = session.score(picture(1), question, tokens[:-1])
                assert error(found, wanted.numpy()) < 1e-4
            session.executor.serve = partial(without_features, session.executor.serve)
            session.context.clear()
            assert error(session.score(picture(1), OTHER, tokens[:-1]), wanted.numpy()) > 1e-2


# --- integers, and what verify says ---------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int8:cache=int8"])
def test_integers_are_what_torch_makes_of_them(checkpoint, tmp_path, precision):
    calibrated.calibrate(checkpoint, PLAN, tmp_path / "calibration")
    given = {"plan": PLAN, "calibration": tmp_path / "calibration", "out": tmp_path}
    bundle = make_bundle(str(checkpoint), target="cpu", precision=precision, **given)
    names = bundle.manifest.quantization.schemes
    assert names["model.layers.4.self_attn.k_proj"] == "w8a8"
    report = run(bundle, calibration=tmp_path / "calibration", model=str(checkpoint))
    assert report.failed is None, failing(report)


def test_verify_runs_the_graphs_that_serve(bundles, checkpoint, tmp_path):
    bundle = bundles(PLAN)
    report = run(bundle, model=str(checkpoint))
    assert report.failed is None, failing(report)
    assert [name for name in statuses(report) if "serve2" in name]
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    layer = "model.layers.4.self_attn"
    names = [f"{layer}.{own}_proj.weight" for own in "kv"]
    spoilt = change_graph(copy, "serve2.onnx", swap(*names))
    assert failing(run(spoilt))[0].startswith("answers")
    name, reason = failing(run(spoilt, model=str(checkpoint)))
    assert name == "weights"
    assert "serve2.onnx" in reason


def test_calls_that_serve_are_observed(bundles):
    with load(bundles(PLAN).path) as session:
        seen = []
        with observed(session.executor, lambda method, given, *_: seen.append((method, given[0]))):
            session.infer(picture(1), QUESTION, max_tokens=1)
    assert [stage for method, stage in seen if method == "serve"] == [0, 2]
