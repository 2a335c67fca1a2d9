"""Files of images that were computed before: what they answer, and what is refused."""

import os
import re

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from visistage.compile.build import make_bundle
from visistage.graphs.errors import ImageError
from visistage.graphs.safetensors_header import read_safetensors
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.stand_ins import stand_in, write_engines
from visistage.tools.explain.explanation import explain

PLANS = (
    *("dense", "visipruner:shallow=1,t=1,e=2,keep=4", "exit-only", "v2drop"),
    *("visionzip:keep=6", "visipruner:shallow=1,t=1,e=2,keep=4,entry=scope-8"),
    "exit-only:e=2,entry=uniform-8-at1",
)
PRUNED = PLANS[1]
QUESTION, OTHER = "What is this?", "And what is beside it, on the left?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    return built_once(checkpoint, tmp_path_factory)


@pytest.fixture(scope="module")
def saved(bundles, tmp_path_factory):
    """The pruned bundle's file of an image."""
    file = tmp_path_factory.mktemp("saved") / "image.safetensors"
    with load(bundles(PRUNED).path) as session:
        session.save_image(picture(1), file)
    return file


def ask(session, image, question=QUESTION):
    session.eos = frozenset()
    return session.infer(image, question, max_tokens=6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_a_loaded_image_answers_like_the_picture(bundles, tmp_path, plan, cache_bytes):
    """Alone, beside another, and where nothing is cached; the encoder never runs for it."""
    file, one, two = tmp_path / "image.safetensors", picture(1), picture(2)
    asked = [(one, QUESTION), (one, OTHER), ([two, one], QUESTION), (two, OTHER), (one, QUESTION)]
    with load(bundles(plan).path) as session:
        wanted = [ask(session, *both).tokens for both in asked]
        session.save_image(session.open(one), file)
    assert len(set(wanted)) == 4
    with load(bundles(plan).path, cache_bytes=cache_bytes) as session:
        image = session.load_image(file)
        answers = []
        for images, question in asked:
            given = image if images is one else images if images is two else [two, image]
            answers.append(ask(session, given, question))
        assert [answer.tokens for answer in answers] == wanted
        assert "vision" not in answers[0].timings.graphs_ms
        assert len(answers[0].shown) == 1
        assert "<img" not in answers[0]._repr_html_()
        session.save_image(image, tmp_path / "again.safetensors")
        assert ask(session, str(file), OTHER).tokens == wanted[1]
        assert session.open(file).key == image.key
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_loaded_image_costs_its_question_alone(bundles, saved):
    with load(bundles(PRUNED).path) as session:
        image, calls = session.load_image(saved), []
        append = session.executor.append
        session.executor.append = lambda *given: calls.append(given[:4]) or append(*given)
        session.infer(image, QUESTION, max_tokens=1)
    assert [stage for stage, *_ in calls] == [0, 1, 2]
    assert [calls[1][3].shape[1] - call[3].shape[1] for call in calls] == [4, 0, 4]


def test_the_library_reads_the_file(saved):
    with safe_open(saved, "np") as file:
        assert file.metadata()["format"] == "visistage image 2"
    assert load_file(saved)["key.0"].shape == (1, 2, 16, 16)


def test_a_device_loads_what_a_cpu_saved(bundles, monkeypatch, tmp_path):
    stand_in(monkeypatch)
    bundle = write_engines(bundles(PRUNED, target="rtx", contexts=(128,)))
    file, own = tmp_path / "image.safetensors", tmp_path / "device.safetensors"
    with load(bundle.path, backend="onnxruntime") as session:
        wanted = [ask(session, picture(1), question).tokens for question in (QUESTION, OTHER)]
        session.save_image(picture(1), file)
    with load(bundle.path) as session:
        image = session.load_image(file)
        assert [ask(session, image, question).tokens for question in (QUESTION, OTHER)] == wanted
        session.save_image(picture(1), own)
        assert load_file(own).keys() == load_file(file).keys()
        session.context.clear()
        assert ask(session, session.load_image(own), OTHER).tokens == wanted[1]


def test_what_needs_the_picture_says_so(bundles, saved):
    with load(bundles(PRUNED).path) as session:
        image = session.load_image(saved)
    for name in ("image", "pixels"):
        with pytest.raises(ImageError, match=r"not the image.*Name the picture"):
            getattr(image, name)
    for given in (image, saved, str(saved)):
        with pytest.raises(ImageError, match=r"image\.safetensors holds what the model computed"):
            explain(bundles(PRUNED).path, [given], QUESTION)


def refused(session, file, says):
    with pytest.raises(ImageError, match=says) as caught:
        session.load_image(file)
    assert file.name in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_of_another_bundle_or_plan_are_refused(bundles, saved, tmp_path):
    with load(bundles(PLANS[0]).path) as session:
        refused(session, saved, "saved with another plan.*Save the image again")
    with load(bundles(PRUNED).path) as session:
        image = session.load_image(saved)
    other = toy.make_checkpoint(tmp_path / "toy", kv_heads=2, seed=1)
    bundle = make_bundle(str(other), plan=PRUNED, out=tmp_path / "engines")
    with load(bundle.path) as session:
        refused(session, saved, "saved with another bundle")
        with pytest.raises(ImageError, match="saved with another bundle"):
            session.infer(image, QUESTION)
        with pytest.raises(ImageError, match="saved with another bundle"):
            session.save_image(image, tmp_path / "x.safetensors")


def rewrite(source, target, metadata=(), **tensors):
    """Copy a file with changes, as the library writes it; None leaves a tensor out."""
    with safe_open(source, "np") as file:
        told = file.metadata() | dict(metadata)
    found = load_file(source) | {name.replace("_0", ".0"): one for name, one in tensors.items()}
    save_file({k: v for k, v in found.items() if v is not None}, target, metadata=told)


def test_a_file_of_other_preprocessing_or_prompt_is_refused(bundles, saved, tmp_path):
    with load(bundles(PRUNED).path) as session:
        for name in ("preprocessing", "prompt"):
            rewrite(saved, tmp_path / "x.safetensors", metadata={name: "0" * 64})
            refused(session, tmp_path / "x.safetensors", f"saved with another {name}")


def test_damage_is_refused_wherever_it_is(bundles, saved, tmp_path):
    """Bits of the header and of every tensor, and lengths."""
    data, file = saved.read_bytes(), tmp_path / "image.safetensors"
    header = read_safetensors(saved, ImageError, "")
    start = min(info.offset for info in header.tensors.values())
    random = np.random.default_rng(0)
    flips = [*random.choice(len(data[:start].rstrip()), 150, replace=False)]
    flips += [info.offset + random.integers(info.nbytes) for info in header.tensors.values()]
    with load(bundles(PRUNED).path) as session:
        for at in flips:
            spoilt = bytearray(data)
            spoilt[at] ^= 1 << int(random.integers(8))
            file.write_bytes(spoilt)
            with pytest.raises(ImageError):
                session.load_image(file)
        for length in (0, 7, 8, start - 1, start, start + 9, len(data) - 1):
            file.write_bytes(data[:length])
            refused(session, file, "corrupt or incomplete")
        file.write_bytes(data + b"x")
        refused(session, file, "its header speaks of")
        refused(session, tmp_path / "nowhere.safetensors", "cannot read")
        assert ask(session, session.load_image(saved)).tokens


def test_sizes_are_compared_before_anything_is_read(bundles, saved, tmp_path, monkeypatch):
    found, file = load_file(saved), tmp_path / "image.safetensors"
    monkeypatch.setattr(np, "fromfile", lambda *given, **more: pytest.fail("read"))
    with load(bundles(PRUNED).path) as session:
        for change in (
            {"key_0": np.zeros((1, 2, 1600, 16), np.float32)},
            {"key_0": found["key.0"].astype(np.float16)},
            {"key_0": None},
            {"more": np.zeros(3, np.float32)},
            {"positions": found["positions"][:-1]},
        ):
            rewrite(saved, file, **change)
            refused(session, file, "expected")


def test_hostile_values_are_refused(bundles, saved, tmp_path, monkeypatch):
    """Whoever sends a file can compute its hash, too."""
    found, file = load_file(saved), tmp_path / "image.safetensors"
    order, values = found.pop("stage0.order"), found["rows"]
    infinite = values.copy()
    infinite[0, 3, 3] = np.inf
    with safe_open(saved, "np") as opened:
        told = opened.metadata()
    with load(bundles(PRUNED).path) as session:
        for orders, rows, says in (
            (order, infinite, "not finite"),
            (order[::-1].copy(), values, "places"),
            (order + 1, values, "places"),
            (order - 1, values, "places"),
        ):
            save_file({**found, "stage0.order": orders, "rows": rows}, file, metadata=told)
            refused(session, file, "damaged")
            with monkeypatch.context() as patch:
                fits = lambda *_: told["sha256"]  # noqa: E731
                patch.setattr("visistage.runtime.image_file.digest_of", fits)
                refused(session, file, says)


def test_metadata_of_others_is_refused(bundles, saved, tmp_path):
    file = tmp_path / "image.safetensors"
    with load(bundles(PRUNED).path) as session:
        save_file({"x": np.zeros(3)}, file)
        refused(session, file, "no image that this version saved")
        rewrite(saved, file, metadata={"image": "../../etc"})
        refused(session, file, "expected a SHA-256")
        rewrite(saved, file, metadata={"more": "x"})
        refused(session, file, "no image that this version saved")
        rewrite(saved, file, metadata={"format": "visistage image 1"})
        refused(session, file, re.escape("found 'visistage image 1'"))


def test_what_cannot_be_written_says_so(bundles, tmp_path):
    with load(bundles(PRUNED).path) as session:
        folder, pipe = tmp_path / "folder.safetensors", tmp_path / "pipe.safetensors"
        folder.mkdir()
        for place in (folder, tmp_path / "no" / "image.safetensors"):
            with pytest.raises(ImageError, match="cannot be written"):
                session.save_image(picture(1), place)
        with pytest.raises(ImageError, match=r"must end in \.safetensors"):
            session.save_image(picture(1), tmp_path / "image.bin")
        if hasattr(os, "mkfifo"):
            os.mkfifo(pipe)
            with pytest.raises(ImageError, match="a pipe or a device"):
                session.save_image(picture(1), pipe)
    assert set(tmp_path.iterdir()) <= {folder, pipe}
