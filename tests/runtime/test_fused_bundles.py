"""Bundles of checkpoints that fuse layers of their encoder, in every lowering and on a device.

The torch chain is held against the obvious form in ``tests/graphs/test_fusion.py``; here bundles
are held against the torch chain.
"""

import numpy as np
import pytest
import torch
from visistage.compile.build import make_bundle
from visistage.compile.export.static_shapes import compiler_peak
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.staged import Staged
from visistage.tests.support.stand_ins import stand_in, write_engines

pytest.importorskip("onnxruntime")

QUESTION, OTHER = "What is this?", "And what is beside it, on the left?"
NEW = 9
PRUNED = "visipruner:shallow=2,t=3,e=6,keep=5"
BUNDLES = {
    "external": (("E_D", "all"), "dense", {}),
    "internal": (("I_D", "3-18-23"), "dense", {}),
    "portable": (("I_D", "3-18-23"), PRUNED, {"target": "cpu-portable"}),
    "pruned": (("I_D", "3-18-23"), PRUNED, {}),
    "blind": (("I_D", "3-18-23"), "v2drop:before=2-5,keep=8-3", {}),
    "entered": (("I_D", "3-18-23"), "scope:keep=6", {}),
    "adaptive": (
        ("I_D", "3-18-23"),
        "visipruner-adaptive:boundaries=3-5,cosine=0.95,contribution=0.5,exit_cosine=0.9",
        {},
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(fusion):
        if fusion not in made:
            made[fusion] = toy.make_checkpoint(
                tmp_path_factory.mktemp("fused"),
                layers=8,
                kv_heads=2,
                encoder_layers=24,
                fusion=fusion,
            )
        return made[fusion]

    return get


@pytest.fixture(scope="module")
def bundles(checkpoints, tmp_path_factory):
    built = {}

    def get(name):
        if name not in built:
            fusion, plan, options = BUNDLES[name]
            out = tmp_path_factory.mktemp("engines")
            path = str(checkpoints(fusion))
            options = {"target": "cpu", **options}
            built[name] = make_bundle(path, plan=plan, out=out, **options)
        return built[name]

    return get


def error(found, wanted):
    return float((np.abs(found - wanted).max(-1) / wanted.std(-1)).max())


@pytest.mark.parametrize("name", BUNDLES)
def test_onnx_runtime_equals_torch(bundles, checkpoints, name):
    """The prompt and eight decode steps; the second time with the image in the cache."""
    bundle = bundles(name)
    judge = Staged(checkpoints(BUNDLES[name][0]), bundle.manifest.plan, torch.float32)
    with load(bundle.path) as session:
        for question in (QUESTION, OTHER):
            tokens, wanted, _ = judge.answer(picture(1), question, NEW)
            found = session.score(picture(1), question, tokens[:-1])
            assert error(found, wanted.numpy()) < 1e-4
        if name in ("internal", "pruned", "blind"):
            session.visual_rows.clear()
            session.executor.encode = lambda *given: encode(*given)._replace(inject={})
            encode = type(session.executor).encode.__get__(session.executor)
            session.context.clear()
            assert error(session.score(picture(1), OTHER, tokens[:-1]), wanted.numpy()) > 1e-2


@pytest.mark.parametrize("name", ["internal", "pruned", "blind", "entered"])
def test_images_of_a_file_and_beside_others_carry_their_features(bundles, name, tmp_path):
    one, two, file = picture(1), picture(2), tmp_path / "image.safetensors"
    asked = [(one, QUESTION), (two, QUESTION), (one, OTHER), ([two, one], QUESTION), (one, OTHER)]
    path = bundles(name).path
    with load(path, cache_bytes=0) as anew, load(path) as session, load(path) as loaded:
        session.save_image(one, file)
        image = loaded.load_image(file)
        for images, question in asked:
            wanted = anew.score(images, question, [7, 8])
            assert error(session.score(images, question, [7, 8]), wanted) < 2e-4
            given = image if images is one else [two, image] if images is not two else two
            assert error(loaded.score(given, question, [7, 8]), wanted) < 2e-4


@pytest.mark.parametrize("plan", ["dense", PRUNED, "fastv:k=2,r=0.5,entry=divprune-9"])
def test_a_device_adds_what_the_cpu_adds(checkpoints, tmp_path, monkeypatch, plan):
    """Stages in parts, calls that are replayed, text behind an image in the same buffers."""
    options = {"contexts": (128,), "build_memory": compiler_peak(200_000)}
    bundle = write_engines(
        make_bundle(
            str(checkpoints(("I_D", "3-18-23"))), plan=plan, out=tmp_path, target="rtx", **options
        )
    )
    with load(bundle.path, backend="onnxruntime", cache_bytes=0) as session:
        wanted = [
            session.score(picture(seed), question, range(9, 17))
            for seed in (1, 2)
            for question in (QUESTION, OTHER)
        ]
    stand_in(monkeypatch)
    with load(bundle.path) as session:
        for seed, own in ((1, wanted[:2]), (2, wanted[2:]), (1, wanted[:2])):
            for question, logits in zip((QUESTION, OTHER), own, strict=True):
                found = session.score(picture(seed), question, range(9, 17))
                assert error(found, logits) < 2e-2  # FP16
        for stage in session.executor.engine_set.stages:
            stage._put_injected = lambda inject, padding: None
        session.context.clear()
        assert error(session.score(picture(1), QUESTION, range(9, 17)), wanted[0]) > 2e-2
