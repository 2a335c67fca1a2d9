"""A canvas: every image is brought to one size first, and has as many tokens as all others."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from visistage.calib.samples import Sample
from visistage.cli.main import main
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.known_models import model_config
from visistage.graphs.bundle import Bundle
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import ModelError
from visistage.graphs.families.registry import with_budget, with_canvas
from visistage.runtime.session import load
from visistage.tools.verify.verify import verify

from ..graphs.test_internvl import picture
from ..support import qwen, tiny_internvl, tiny_next, tiny_onevision, tiny_smolvlm
from ..support.asking import asking
from ..support.families import TINY

NEW = 8
MODULES = {
    "internvl": tiny_internvl,
    "llava_next": tiny_next,
    "llava_onevision": tiny_onevision,
    "qwen3_vl": qwen,
    "qwen2_5_vl": qwen,
    "smolvlm": tiny_smolvlm,
}
CANVASES = {  # height and width, and the tokens of every image
    "internvl": ((64, 96), 28),
    "llava_next": ((32, 16), 56),
    "llava_onevision": ((54, 54), 88),
    "qwen3_vl": ((32, 40), 20),
    "qwen2_5_vl": ((40, 32), 20),
    "smolvlm": ((32, 64), 12),
}
SHAPES = [(64, 48), (30, 33), (20, 90)]


def on(canvas, image, folder, filter_=None):
    """An image on the canvas, as plain Pillow brings it there."""
    steps = json.loads((folder / "preprocessor_config.json").read_text())
    return image.resize(canvas[::-1], filter_ or Image.Resampling(steps["resample"]))


@pytest.fixture(scope="module", params=CANVASES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    TINY[request.param].make(folder / "tiny")
    canvas, rows = CANVASES[request.param]
    out = folder / "engines"
    bundle = make_bundle(str(folder / "tiny"), plan="dense", canvas=canvas, out=out)
    return request.param, folder, bundle, canvas, rows


def test_answers_are_those_of_transformers_about_the_resized_image(made):
    name, folder, bundle, canvas, rows = made
    judge = MODULES[name].Judge(folder / "tiny")
    with load(bundle.path) as session:
        for seed, shape in enumerate(SHAPES):
            image = picture(*shape, seed)
            resized = on(canvas, image, folder / "tiny")
            wanted, logits = judge.answer(asking("What?"), [resized], NEW)
            ours = session.score(image, "What?", wanted)[:NEW]
            assert np.abs(ours - logits.numpy()).max() < 1e-4 * logits.std()
            assert session.infer(image, "What?", max_tokens=1).plan.visual_tokens == rows
        other = on(canvas, image, folder / "tiny", Image.Resampling.BOX)
        _, logits = judge.answer(asking("What?"), [other], NEW)
        assert np.abs(ours[0] - logits[0].numpy()).max() > 1e-3 * logits.std()


def test_the_vision_graph_has_one_size(made):
    _, _, bundle, canvas, rows = made
    spec = Bundle.open(bundle.path).manifest.graphs["vision"].spec
    sizes = [size for tensor in (*spec.inputs, *spec.outputs) for size in tensor.shape]
    assert all(isinstance(size, int) for size in sizes)
    assert bundle.manifest.config.canvas == canvas
    assert bundle.manifest.config.visual_tokens == bundle.manifest.plan.visual_tokens == rows
    assert bundle.path.name == "dense-fp32-cpu-canvas{}x{}".format(*canvas)
    assert ModelConfig.from_dict(bundle.manifest.config.to_dict()) == bundle.manifest.config


def test_keys_and_files_of_images_know_of_it(made, tmp_path):
    _, folder, bundle, _, _ = made
    plain = make_bundle(str(folder / "tiny"), plan="dense", out=folder / "engines")
    image = picture(40, 31)
    with load(bundle.path) as session, load(plain.path) as other:
        assert session.open(image).key != other.open(image).key
        session.save_image(image, tmp_path / "a.safetensors")
        asked = session.infer(tmp_path / "a.safetensors", "What?", max_tokens=NEW)
        assert asked.tokens == session.infer(image, "What?", max_tokens=NEW).tokens


def test_verify_finds_it_right(made):
    _, folder, bundle, _, _ = made
    samples = [Sample(str(n), picture(*size, n), "What?", "") for n, size in enumerate(SHAPES)]
    report = verify(bundle, samples, model=str(folder / "tiny"), max_tokens=4)
    assert report.failed is None, report.failed


@pytest.mark.parametrize(("name", "tokens"), [("llava_next", 60), ("internvl", 28), ("smolvlm", 8)])
def test_verify_knows_of_a_budget(tmp_path, name, tokens):
    TINY[name].make(tmp_path / "tiny")
    model = str(tmp_path / "tiny")
    bundle = make_bundle(model, plan="dense", image_tokens=tokens, out=tmp_path)
    samples = [Sample(str(n), picture(*size, n), "What?", "") for n, size in enumerate(SHAPES)]
    report = verify(bundle, samples, model=model, max_tokens=4)
    assert report.failed is None, report.failed


def test_plan_and_inspect_show_it(made):
    _, folder, bundle, canvas, rows = made
    written = "{}x{}".format(*canvas)
    words = ["plan", "dense", str(folder / "tiny"), "--canvas", written]
    facts = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    (image,) = facts["images"]
    assert (image["height"], image["width"], image["tokens"]) == (*canvas, rows)
    assert facts["stages"][0]["visual_tokens"] == rows
    assert "on the canvas" in CliRunner().invoke(main, words).stdout
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)]).stdout
    assert f"canvas of {written}" in shown
    found = json.loads(CliRunner().invoke(main, ["inspect", str(bundle.path), "--json"]).stdout)
    assert found["canvas"] == list(canvas)


@pytest.mark.parametrize(
    ("model", "canvas", "message"),
    [
        ("llava-7b", (336, 336), "every image takes 576 tokens.*Leave out --canvas"),
        ("qwen3-vl-2b", (480, 650), "480x650, height x width.*to 480x640. Give that"),
        ("qwen3-vl-2b", (32, 9600), "--canvas 32x9600.*200 times"),
        ("qwen2.5-vl-7b", (14, 14), "to 56x56. Give that"),
        ("internvl3-2b", (480, 640), "to 1344x1792. Give that"),
        ("llava-next-7b", (480, 640), "to 672x672. Give that"),
        ("llava-onevision-0.5b", (480, 640), "to 768x768. Give that"),
    ],
)
def test_a_canvas_that_a_family_would_change_is_refused(model, canvas, message):
    with pytest.raises(ModelError, match=message):
        model_config(model, None, canvas)


def test_what_is_named_instead_can_be_had():
    for model, canvas in (
        ("qwen3-vl-2b", (480, 640)),
        ("internvl3-2b", (1344, 1792)),
        ("llava-next-7b", (672, 672)),
        ("llava-onevision-0.5b", (768, 768)),
    ):
        config = model_config(model, None, canvas)
        assert config.canvas == canvas
        assert config.visual_tokens == config.layout(1, 1).rows == config.layout(999, 9).rows


def test_a_budget_comes_first():
    config = with_budget(model_config("internvl3-2b"), 1280)
    with pytest.raises(ModelError, match=r"to 896x896\. Give that"):
        with_canvas(config, (1344, 1792))
    assert with_canvas(config, (896, 896)).visual_tokens == 1280


def test_a_wrong_option_says_how_to_write_it():
    done = CliRunner().invoke(main, ["plan", "dense", "qwen3-vl-2b", "--canvas", "640"])
    assert done.exit_code == 2
    assert "Write them like 480x640" in done.stderr
