"""SmolVLM against transformers: layouts and pixels without a model, then a tiny checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
from visistage.calib.calibrate import calibrate
from visistage.calib.plan_search.measure_plans import Origin
from visistage.calib.samples import Sample
from visistage.compile.build import make_bundle
from visistage.graphs.config import Limits, ModelConfig
from visistage.graphs.errors import ModelError
from visistage.graphs.families.registry import with_budget
from visistage.graphs.progress import Progress
from visistage.runtime.session import load
from visistage.tools.verify.verify import verify

from ..support import tiny_smolvlm as tiny
from ..support.asking import asking
from ..support.written import check_pixels
from .test_internvl import NEW, Case, picture, sizes

PUBLISHED = {
    "model_type": "smolvlm",
    "scale_factor": 4,
    "image_token_id": 49190,
    "text_config": {"vocab_size": 49280},
    "vision_config": {"image_size": 512, "patch_size": 16, "num_attention_heads": 12},
}
SHAPES = [(64, 48), (32, 32), (30, 64), (64, 20), (5, 90), (100, 99)]
TOKENS = "<fake_token_around_image>", "<image>", "<global-img>"


def test_rows_and_markers_are_those_of_the_processor():
    config = ModelConfig.from_hf(PUBLISHED).within(Limits(most=2048))
    processor = SmolVLMImageProcessorPil(size={"longest_edge": 2048})
    kwargs = {"do_image_splitting": True, "max_image_size": {"longest_edge": 512}}
    kwargs["size"] = {"longest_edge": 2048}
    for height, width in [*sizes(300), (336, 336), (480, 640), (1080, 1920)]:
        layout = config.layout(height, width)
        count, rows, columns = processor.get_number_of_image_patches(height, width, kwargs)
        expanded = get_image_prompt_string(rows, columns, 2, *TOKENS)
        ours = "".join(run if isinstance(run, str) else "<image>" * 2 for run in layout.runs)
        assert ours == expanded
        assert layout.rows == 64 * count == len(layout.positions) == len(layout.boxes)
        assert layout.rows <= config.visual_tokens
    assert [config.layout(*size).rows for size in ((336, 336), (480, 640))] == [1088, 832]
    assert config.visual_tokens == 1088


def test_a_budget_is_a_shorter_edge():
    config = ModelConfig.from_hf(PUBLISHED).within(Limits(most=2048))
    for tokens, edge in ((64, 512), (319, 512), (320, 1024), (640, 1536), (9999, 2048)):
        capped = with_budget(config, tokens)
        assert capped.limits.most == edge
        assert capped.visual_tokens <= tokens
    with pytest.raises(ModelError, match="--image-tokens is 63, a tile takes 64"):
        with_budget(config, 63)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("smolvlm"))


@pytest.mark.parametrize("size", SHAPES)
def test_pixels_are_those_of_the_processor(folder, size):
    config = ModelConfig.from_hf(tiny.make_config()).within(Limits(most=64))
    check_pixels(folder, config, tiny.image_processor(folder), picture(*size))


class SmolCase(Case):
    """As of InternVL: text, a wide image, text, a tall one, text."""

    family = tiny


@pytest.fixture(scope="module", params=tiny.CLASSES)
def case(request, tmp_path_factory):
    return SmolCase(tmp_path_factory.mktemp(request.param), request.param)


def test_ids_are_those_of_the_processor(case):
    theirs = case.judge.inputs(case.messages, case.images)["input_ids"][0].tolist()
    runs = iter(stop - start for layout in case.layouts for start, stop in layout.spans)
    ours = []
    for segment in case.facts.encoder.encode(case.messages, 2, case.layouts).segments:
        image = [tiny.SPECIALS["<image>"]]
        ours += image * next(runs) if segment.is_image else segment.ids
    assert ours == theirs


def test_dense_is_transformers(case):
    result = case.run()
    assert len(set(case.tokens)) > 3
    assert result.tokens[0].tolist() == case.tokens
    assert case.difference(result) < 1e-4


def whole_of_the_picture(found):
    return replace(found, whole_of="picture")


def squeezed_once(found):
    return replace(found, resizes=found.resizes[1:])


def whole_first(found):
    return replace(found, whole="first" if found.whole else "")


@pytest.mark.parametrize("mistake", [whole_of_the_picture, squeezed_once, whole_first])
def test_mistakes_of_the_layout_are_noticed(case, monkeypatch, mistake):
    case.mistake_layouts(monkeypatch, mistake)
    assert case.difference(case.run()) > 1e-3


def test_a_bundle_answers_as_transformers_and_sees_an_image_once(folder, tmp_path):
    judge = tiny.Judge(folder)
    bundle = make_bundle(str(folder), plan="dense", out=tmp_path)
    with load(bundle.path) as session:
        images = [picture(*size, seed) for seed, size in enumerate(SHAPES[:4])]
        for image in (*images, images[:2]):
            count = len(image) if isinstance(image, list) else 1
            for words in ("What?", "And now?"):
                given = image if isinstance(image, list) else [image]
                wanted, logits = judge.answer(asking(words, count), given, NEW)
                ours = session.score(image, words, wanted)[:NEW]
                assert np.abs(ours - logits.numpy()).max() < 1e-4 * logits.std()
        calls = []
        append = session.executor.append
        session.executor.append = lambda *given: calls.append(given) or append(*given)
        answer = session.infer(images[0], "Third?", max_tokens=1)
        assert len(calls) == 1  # the question's own
        assert answer.plan.visual_tokens == 20
        assert answer.shown[0].kept(None).all()
        session.context.clear()
        calls.clear()
        session.infer(images[0], "Third?", max_tokens=1)
        assert len(calls) <= 3  # text, the whole image with its markers, the question
    samples = [Sample(str(n), picture(*size, n), "What?", "") for n, size in enumerate(SHAPES[:3])]
    report = verify(bundle, samples, model=str(folder), max_tokens=4)
    assert report.failed is None, report.failed


def test_plans_and_calibrations_take_runs_as_they_come(folder, tmp_path):
    """A selection takes K of the rows of all tiles; markers are text and stay."""
    plan = "visipruner:shallow=1,t=1,e=2,keep=6"
    samples = [Sample(str(n), picture(*size, n), "What?", "cat") for n, size in enumerate(SHAPES)]
    found, _ = calibrate(
        Origin(str(folder)), samples, plan, files=["x"], out=tmp_path, progress=Progress()
    )
    bundle = make_bundle(str(folder), plan=plan, out=tmp_path, precision="int8", calibration=found)
    report = verify(bundle, samples[:2], model=str(folder), calibration=found, max_tokens=4)
    assert report.failed is None, report.failed
    with load(bundle.path) as session, load(bundle.path, cache_bytes=0) as anew:
        for image in (picture(*SHAPES[0]), picture(*SHAPES[1])):
            for words in ("What?", "Who?"):
                answer = session.infer(image, words, max_tokens=NEW)
                assert answer.tokens == anew.infer(image, words, max_tokens=NEW).tokens
                assert len(answer.plan.kept) == min(6, answer.plan.visual_tokens)
