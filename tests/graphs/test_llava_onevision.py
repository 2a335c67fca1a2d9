"""LLaVA-OneVision against transformers: layouts and pixels without a model, then a checkpoint."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from visistage.calib.samples import Sample
from visistage.compile.build import make_bundle
from visistage.graphs.config import Limits, ModelConfig
from visistage.graphs.errors import ModelError, PromptError
from visistage.graphs.families import llava_next
from visistage.graphs.families.registry import with_budget
from visistage.graphs.modules.vision import Pack
from visistage.runtime.session import load
from visistage.tools.verify.verify import verify

from ..support import tiny_onevision as tiny
from ..support.asking import asking
from ..support.written import check_pixels
from .test_internvl import NEW, Case, picture, sizes

PUBLISHED = {"model_type": "llava_onevision", "text_config": {"vocab_size": 152000}}
KNOWN = [(336, 336), (480, 640), (720, 1280), (1080, 1920), (3024, 4032), (1, 1), (1, 4000)]
SHAPES = [(40, 30), (60, 62), (20, 30), (90, 20), (18, 18), (7, 90), (54, 36), (33, 71)]
WHOLE = 16
"""Rows of a tile of the tiny checkpoint."""


def counter(config, edge):
    """The processor's own count of rows, without files."""
    sizes = [list(size) for size in config.limits.sizes]
    steps = SimpleNamespace(image_grid_pinpoints=sizes)
    ratio = f"anyres_max_{config.limits.most}"
    own = {"num_image_tokens": edge**2, "vision_aspect_ratio": ratio, "image_processor": steps}
    side = config.vision.image_size

    def count(height, width):
        given = SimpleNamespace(**own, _get_unpadded_features=unpadded)
        return LlavaOnevisionProcessor._get_number_of_features(given, height, width, side, side)

    def unpadded(*given):
        return LlavaOnevisionProcessor._get_unpadded_features(SimpleNamespace(**own), *given)

    return count


def test_rows_are_those_that_the_processor_counts():
    config = ModelConfig.from_hf(PUBLISHED)
    count, shrunk = counter(config, 27), 0
    for height, width in [*sizes(400), *KNOWN]:
        layout = config.layout(height, width)
        feeds = layout.feeds
        assert layout.rows == count(height, width) == len(feeds["pack"]) == len(layout.boxes)
        assert layout.rows <= config.visual_tokens
        assert feeds["weights"].shape == feeds["pack"].shape == (layout.rows, 4)
        assert np.abs(feeds["weights"].sum(1) - 1).max() < 1e-6
        assert layout.tiles <= config.most_tiles == 37
        shrunk += bool((feeds["weights"] % 1).any())
    assert [config.layout(*size).rows for size in KNOWN[:4]] == [1485, 2929, 5967, 7269]
    assert 100 < shrunk < 400


def test_the_most_rows_are_those_of_some_picture():
    """Compare with all shapes of pictures; those of one side at the cap are the largest."""
    config = ModelConfig.from_hf(tiny.make_config())
    count = counter(config, 4)
    known = [count(high, wide) for high in range(1, 120) for wide in range(1, 120)]
    assert max(known) == config.visual_tokens


def test_published_configs_are_the_defaults():
    config = ModelConfig.from_hf(PUBLISHED)
    assert config == ModelConfig.from_hf(
        {
            **PUBLISHED,
            "image_token_index": 151646,
            "vision_feature_layer": -1,
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 384}
            | {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26}
            | {"num_attention_heads": 16, "patch_size": 14},
        }
    )
    assert (config.image_token_id, config.encoder_depth) == (151646, 26)
    assert len(config.limits.sizes) == 36
    assert config.limits.most == 9
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "anyres_max_ and a number"),
        ({"vision_feature_select_strategy": "default"}, "full, with SigLIP"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "full, with SigLIP"),
        ({"image_grid_pinpoints": [[384, 400]]}, "image_grid_pinpoints"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf({**PUBLISHED, **change})


def test_a_budget_leaves_sizes_out():
    config = ModelConfig.from_hf(PUBLISHED)
    capped = with_budget(config, 3000)
    assert capped.limits.most == 9
    assert (768, 768) not in capped.limits.sizes
    assert {(384, 384), (384, 1152)} <= set(capped.limits.sizes)
    assert all(capped.layout(*size).rows <= 3000 for size in sizes(50))
    with pytest.raises(ModelError, match=r"--image-tokens is 729.*Give 1485 or more"):
        with_budget(config, 729)


def test_rows_are_packed_as_transformers_packs_them():
    """Compare features of hundreds of channels, for pictures that shrink and that do not."""
    config = ModelConfig.from_hf(tiny.make_config())
    theirs = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=tiny.SIDE, patch_size=4),
            image_grid_pinpoints=[list(size) for size in config.limits.sizes],
        )
    )
    pack = Pack(8)
    pack.newline.data = torch.randn(8)
    for height, width in [*SHAPES, *sizes(60, 150)]:
        layout = config.layout(height, width)
        rows = torch.randn(layout.tiles, WHOLE, 8)
        (wanted,), _ = LlavaOnevisionModel.pack_image_features(
            theirs, [rows], [(height, width)], pack.newline, "anyres_max_4"
        )
        feeds = [torch.from_numpy(feed) for feed in layout.feeds.values()]
        ours = pack(rows.flatten(0, 1)[None], *feeds)[0]
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() < 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("onevision"))


@pytest.mark.parametrize("size", SHAPES)
def test_pixels_are_those_of_the_processor(folder, size):
    config = ModelConfig.from_hf(tiny.make_config())
    check_pixels(folder, config, tiny.image_processor(folder), picture(*size))


class OnevisionCase(Case):
    """As of InternVL: text, a wide image, which shrinks, text, a smaller one, text."""

    family = tiny

    def __init__(self, path):
        super().__init__(path, None)


@pytest.fixture(scope="module")
def case(folder):
    return OnevisionCase(folder)


def test_dense_is_transformers(case):
    result = case.run()
    assert len(set(case.tokens)) > 3
    assert result.tokens[0].tolist() == case.tokens
    assert case.difference(result) < 1e-4
    shrunk = [bool((layout.feeds["weights"] % 1).any()) for layout in case.layouts]
    assert shrunk == [True, False]


def test_ids_are_those_of_the_processor(case):
    theirs = case.judge.inputs(case.messages, case.images)["input_ids"][0].tolist()
    rows = iter(layout.rows for layout in case.layouts)
    ours = []
    for segment in case.facts.encoder.encode(case.messages, 2, case.layouts).segments:
        ours += [tiny.SPECIALS["<image>"]] * next(rows) if segment.is_image else segment.ids
    assert ours == theirs


def nearest(found):
    """A row is that of four which weighs most."""
    most = np.eye(4, dtype=np.float32)[found.feeds["weights"].argmax(1)]
    return replace(found, feeds=found.feeds | {"weights": most})


def swapped(found):
    """Shares of columns are taken for those of lines."""
    shares = found.feeds["weights"].reshape(-1, 2, 2).swapaxes(1, 2).reshape(-1, 4)
    return replace(found, feeds=found.feeds | {"weights": np.ascontiguousarray(shares)})


def without_ends(found):
    last = found.tiles * WHOLE - 1
    return replace(found, feeds=found.feeds | {"pack": np.minimum(found.feeds["pack"], last)})


def whole_last(found):
    return replace(found, whole="last")


@pytest.mark.parametrize("mistake", [nearest, swapped, without_ends, whole_last])
def test_mistakes_of_the_layout_are_noticed(case, monkeypatch, mistake):
    case.mistake_layouts(monkeypatch, mistake)
    assert case.difference(case.run()) > 1e-3


def aligned(cells, count):
    """Corners of the shrunk lines are those of all."""
    exact = np.linspace(0, len(cells) - 1, count, dtype=np.float32)
    low = exact.astype(np.int64)
    places = np.stack([low, (low + 1).clip(max=len(cells) - 1)], 1)
    return cells[places], np.stack([1 - exact + low, exact - low], 1)


def test_another_interpolation_is_noticed(case, monkeypatch):
    monkeypatch.setattr(llava_next, "_taps", aligned)
    llava_next.layout.cache_clear()
    assert case.difference(case.run()) > 1e-3
    llava_next.layout.cache_clear()


def test_not_shrinking_is_noticed(case, monkeypatch):
    known = case.config
    monkeypatch.setattr(case, "config", known.within(Limits(most=99, sizes=known.limits.sizes)))
    assert case.difference(case.run()) > 1e-3


def test_a_bundle_answers_as_transformers_and_sees_an_image_once(folder, tmp_path):
    judge = tiny.Judge(folder)
    bundle = make_bundle(str(folder), plan="dense", out=tmp_path)
    with load(bundle.path) as session:
        images = [picture(*size, seed) for seed, size in enumerate(SHAPES[:4])]
        for given in (*([image] for image in images), images[:2]):
            for words in ("What?", "And now?"):
                wanted, logits = judge.answer(asking(words, len(given)), given, NEW)
                ours = session.score(given, words, wanted)[:NEW]
                assert np.abs(ours - logits.numpy()).max() < 1e-4 * logits.std()
        calls = []
        append = session.executor.append
        session.executor.append = lambda *given: calls.append(given) or append(*given)
        session.infer(images[0], "Third?", max_tokens=1)
        assert len(calls) == 1  # the question's own
        assert session.infer(images[0], "?", max_tokens=1).shown[0].kept(None).all()
        frames = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
        with pytest.raises(PromptError, match="a video, which no model reads here"):
            session.infer(None, frames)
    samples = [Sample(str(n), picture(*size, n), "What?", "") for n, size in enumerate(SHAPES[:3])]
    report = verify(bundle, samples, model=str(folder), max_tokens=4)
    assert report.failed is None, report.failed


@pytest.mark.parametrize("target", ["cpu-portable"])
def test_portable_graphs_answer_alike(folder, tmp_path, target):
    own, portable = (
        make_bundle(str(folder), plan="dense", out=tmp_path / name, target=name)
        for name in ("cpu", target)
    )
    with load(own.path) as one, load(portable.path) as other:
        for seed, size in enumerate(SHAPES[:3]):
            tokens = one.infer(picture(*size, seed), "What?", max_tokens=NEW).tokens
            assert other.infer(picture(*size, seed), "What?", max_tokens=NEW).tokens == tokens
