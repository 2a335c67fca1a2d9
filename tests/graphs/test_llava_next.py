"""LLaVA-NeXT against transformers: layouts and pixels without a model, then a tiny checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from visistage.calib.samples import Sample
from visistage.compile.build import make_bundle
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import ModelError
from visistage.graphs.families.registry import with_budget
from visistage.runtime.session import load
from visistage.tools.verify.verify import verify

from ..support import tiny_next as tiny
from ..support.written import check_pixels
from .test_internvl import NEW, Case, picture, sizes

PUBLISHED = {"model_type": "llava_next", "text_config": {"vocab_size": 32064}}
SHAPES = [(20, 30), (30, 20), (16, 16), (47, 16), (5, 90), (61, 60), (33, 31), (100, 99)]


class Counter(LlavaNextProcessor):
    """The processor's count of rows, without files."""

    def __init__(self, sizes):
        self.image_processor = type("Steps", (), {"image_grid_pinpoints": sizes})
        self.patch_size, self.num_additional_image_tokens = 14, 1


def test_rows_are_those_that_the_processor_counts():
    config = ModelConfig.from_hf(PUBLISHED)
    counter = Counter([list(size) for size in config.limits.sizes])
    known = [(336, 336), (480, 640), (720, 1280), (1080, 1920), (3024, 4032), (1, 1), (1, 4000)]
    for height, width in [*sizes(500), *known]:
        layout = config.layout(height, width)
        rows = counter._get_number_of_features(height, width, 336, 336) - 1
        assert layout.rows == rows == len(layout.feeds["pack"]) == len(layout.boxes)
        assert layout.rows <= config.visual_tokens
    assert [config.layout(*size).rows for size in known[:5]] == [1176, 2340, 1948, 1948, 2340]
    assert config.visual_tokens == 2928


def test_a_budget_leaves_sizes_out():
    config = ModelConfig.from_hf(PUBLISHED)
    capped = with_budget(config, 2000)
    assert capped.limits.sizes == ((336, 672), (672, 336))
    assert capped.visual_tokens == 1776
    assert all(capped.layout(*size).rows <= 2000 for size in sizes(50))
    with pytest.raises(ModelError, match=r"--image-tokens is 576.*Give 1752 or more"):
        with_budget(config, 576)


@pytest.mark.parametrize(
    "given", [[], [[336]], [[336, 337]], [[336, "672"]], "anyres", [[0, 336]], [[-336, 336]]]
)
def test_sizes_that_no_tiles_fill_are_refused(given):
    with pytest.raises(ModelError, match="image_grid_pinpoints"):
        ModelConfig.from_hf({**PUBLISHED, "image_grid_pinpoints": given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def case(folder):
    return NextCase(folder)


class NextCase(Case):
    """As of InternVL: text, a wide image, text, a square one, text."""

    family = tiny

    def __init__(self, path):
        super().__init__(path, None)


@pytest.mark.parametrize("size", SHAPES)
def test_pixels_are_those_of_the_processor(folder, size):
    config = ModelConfig.from_hf(tiny.make_config())
    check_pixels(folder, config, tiny.image_processor(folder), picture(*size))


def test_dense_is_transformers(case):
    result = case.run()
    assert len(set(case.tokens)) > 3
    assert result.tokens[0].tolist() == case.tokens
    assert case.difference(result) < 1e-4


def reversed_lines(found):
    index = found.feeds["pack"]
    return replace(found, feeds={"pack": np.concatenate([index[:16], index[16:][::-1]])})


def without_ends(found):
    """Ends of lines are taken for the last patch."""
    return replace(found, feeds={"pack": np.minimum(found.feeds["pack"], found.tiles * 16 - 1)})


def padded(found):
    return replace(found, resizes=(found.padded,))


@pytest.mark.parametrize("mistake", [reversed_lines, without_ends, padded])
def test_mistakes_of_the_layout_are_noticed(case, monkeypatch, mistake):
    case.mistake_layouts(monkeypatch, mistake)
    assert case.difference(case.run()) > 1e-2


def test_a_bundle_answers_as_transformers(folder, tmp_path):
    judge = tiny.Judge(folder)
    bundle = make_bundle(str(folder), plan="dense", out=tmp_path)
    with load(bundle.path) as session:
        for seed, size in enumerate(SHAPES[:4]):
            image = picture(*size, seed)
            asked = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
            ]
            wanted, logits = judge.answer(asked, [image], NEW)
            ours = session.score(image, "?", wanted)[:NEW]
            assert np.abs(ours - logits.numpy()).max() < 1e-4 * logits.std()
            shown = session.infer(image, "?", max_tokens=1).shown[0]
            assert shown.kept(None).all()
    samples = [Sample(str(n), picture(*size, n), "What?", "") for n, size in enumerate(SHAPES[:3])]
    report = verify(bundle, samples, model=str(folder), max_tokens=4)
    assert report.failed is None, report.failed
