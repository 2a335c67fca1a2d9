"""InternVL against transformers: layouts and pixels without a model, then tiny checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import text_facts
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.torch_encoder import TorchEncoder
from visistage.graphs.config import Limits, ModelConfig
from visistage.graphs.errors import ModelError
from visistage.graphs.families import internvl
from visistage.graphs.families.registry import FAMILIES, with_budget
from visistage.graphs.families.tiles import best_grid
from visistage.graphs.modules import vision
from visistage.graphs.presets.presets import preset
from visistage.runtime.image.image import load_image, prepare
from visistage.runtime.image.preprocessing import Preprocessing

from ..support import tiny_internvl as tiny

NEW = 12
PUBLISHED = {
    "model_type": "internvl",
    "text_config": {"model_type": "qwen2", "vocab_size": 151674},
    "vision_config": {"attention_bias": True},
}


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def sizes(count, most=3000, seed=0):
    return np.random.default_rng(seed).integers(1, most, (count, 2)).tolist()


# --- layouts, without a model ---------------------------------------------------------------------


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 12), (5, 7), (1, 1), (1, 40)])
def test_rows_are_those_that_the_processor_counts(least, most):
    config = ModelConfig.from_hf(PUBLISHED).within(Limits(least, most))
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448})
    kwargs = {"crop_to_patches": True, "min_patches": least, "max_patches": most}
    found = set()
    for height, width in [*sizes(400), (448, 448), (896, 448), (480, 640), (1080, 1920), (1, 2999)]:
        layout = config.layout(height, width)
        tiles = processor.get_number_of_image_patches(height, width, kwargs)
        assert (layout.rows, layout.tiles) == (256 * tiles, tiles)
        assert layout.runs == ("<img>", layout.rows, "</img>")
        assert len(layout.positions) == len(layout.boxes) == layout.rows <= config.visual_tokens
        found.add(tiles)
    assert len(found) > 1 or most == 1


def test_rows_of_well_known_sizes():
    config = ModelConfig.from_hf(PUBLISHED)
    counts = [config.layout(*size).rows for size in ((336, 336), (480, 640), (1080, 1920))]
    assert counts == [256, 3328, 2304]
    assert config.visual_tokens == 3328
    assert config.layout(480, 640).grid == (3, 4)


def test_a_budget_is_a_cap_on_tiles():
    config = ModelConfig.from_hf(PUBLISHED)
    for tokens, most in ((256, 1), (767, 1), (768, 2), (1024, 3), (2304, 8), (9000, 12)):
        capped = with_budget(config, tokens)
        assert capped.limits == Limits(1, most)
        assert capped.visual_tokens <= tokens
        assert ModelConfig.from_dict(capped.to_dict()) == capped
    with pytest.raises(ModelError, match="--image-tokens is 255, an image takes 256"):
        with_budget(config, 255)
    with pytest.raises(ModelError, match=r"--image-tokens is 768.*Give 1280 or more"):
        with_budget(config.within(Limits(4, 12)), 768)


def test_boxes_cover_the_picture_once_and_the_whole_once_more():
    layout = ModelConfig.from_hf(PUBLISHED).layout(480, 640)
    area = (layout.boxes[:, 2] - layout.boxes[:, 0]) * (layout.boxes[:, 3] - layout.boxes[:, 1])
    assert area.sum() == pytest.approx(2)
    assert area[-256:].sum() == pytest.approx(1)
    assert layout.boxes[256] == pytest.approx([0.25, 0, 0.25 + 1 / 64, 1 / 48])
    assert layout.boxes.min() == 0
    assert layout.boxes.max() == pytest.approx(1)


@pytest.mark.parametrize(
    "size", [(32, 32), (64, 48), (33, 30), (200, 31), (31, 200), (1, 90), (700, 500)]
)
def test_pixels_are_those_of_the_processor(size):
    config = ModelConfig.from_hf(tiny.make_config())
    steps = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "min_patches": 1,
        "max_patches": 12,
    }
    image = picture(*size)
    theirs = GotOcr2ImageProcessorPil(**steps)(image, crop_to_patches=True, return_tensors="np")
    steps["image_processor_type"] = "GotOcr2ImageProcessorFast"
    ours = prepare(
        load_image(image),
        Preprocessing.from_files(None, steps),
        config.layout(image.height, image.width),
    )
    assert ours.shape == theirs["pixel_values"].shape
    assert np.abs(ours - theirs["pixel_values"]).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling is False"),
        ({"vision_config": {"norm_type": "batch"}}, "norm_type is 'batch'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ({"downsample_ratio": 1 / 3}, "block of downsample_ratio"),
        ({"text_config": {"model_type": "gpt_oss"}}, "gpt_oss.*not supported"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf({**PUBLISHED, **change})


# --- tiny checkpoints -----------------------------------------------------------------------------


class Case:
    """A checkpoint in both hands, and a prompt of text, a wide image, text, a square one, text."""

    family = tiny

    def __init__(self, path, decoder, **options):
        if decoder is not None:
            self.family.make_checkpoint(path, decoder, **options)
        self.judge = self.family.Judge(path)
        checkpoint = open_checkpoint(str(path))
        self.config, self.facts = checkpoint.config, text_facts(checkpoint)
        self.weights = {name: checkpoint.load(name).float() for name in checkpoint.tensors}
        self.text = checkpoint.raw["text_config"]
        self.images = [picture(64, 48, 1), picture(30, 33, 2)]  # the cap, and one tile
        say = [("text", "Look: "), ("image", None), ("text", "and "), ("image", None)]
        say.append(("text", "What?"))
        content = [{"type": kind, **({"text": text} if text else {})} for kind, text in say]
        self.messages = [{"role": "user", "content": content}]
        self.tokens, self.logits = self.judge.answer(self.messages, self.images, NEW)

    @property
    def layouts(self):
        return [self.config.layout(image.height, image.width) for image in self.images]

    def mistake_layouts(self, monkeypatch, mistake):
        """Let ``mistake`` change every layout of an image."""
        known = FAMILIES[self.config.family]
        wrong = replace(known, layout=lambda *given: mistake(known.layout(*given)))
        monkeypatch.setitem(FAMILIES, self.config.family, wrong)

    def run(self, plan="dense", encoder=TorchEncoder, **options):
        layouts = self.layouts
        segments = self.facts.encoder.encode(self.messages, 2, layouts).segments
        staged = preset(plan, self.config.text.layers, self.config.visual_tokens, **options)
        encode = encoder(self.config, staged, self.weights)
        steps = Preprocessing.from_dict(self.facts.preprocessing)
        table = self.weights["model.embed_tokens.weight"]
        runs, rows, spans, at = [], [], [], 0
        for image, layout in zip(self.images, layouts, strict=True):
            pixels = torch.from_numpy(prepare(load_image(image), steps, layout))
            whole = encode(pixels, feeds=layout.feeds).rows
            runs += [whole[:, start:stop] for start, stop in layout.spans]
        left = iter(runs)
        for segment in segments:
            rows.append(next(left) if segment.is_image else table[list(segment.ids)][None])
            if segment.is_image:
                spans.append((at, at + rows[-1].shape[1]))
            at += rows[-1].shape[1]
        return chain.run(self.weights, self.text, torch.cat(rows, 1), [spans], staged, NEW)

    def difference(self, result):
        """Largest difference of logits, as a share of their spread, while tokens agree."""
        mine, theirs = result.step_logits[0], self.logits
        same = NEW
        for step, (a, b) in enumerate(zip(result.tokens[0].tolist(), self.tokens, strict=True)):
            if a != b:
                same = step + 1
                break
        return float((mine[:same] - theirs[:same]).abs().max() / theirs.std())


KINDS = {
    "qwen2": {},
    "llama": {},
    "qwen3": {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},
}


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Case(folder, request.param, **KINDS[request.param])


def test_dense_is_transformers(case):
    result = case.run()
    assert len(set(case.tokens)) > 5
    assert result.tokens[0].tolist() == case.tokens
    assert case.difference(result) < 1e-4


def test_ids_are_those_of_the_processor(case):
    theirs = case.judge.inputs(case.messages, case.images)["input_ids"][0].tolist()
    layouts = [case.config.layout(image.height, image.width) for image in case.images]
    ours, known = [], iter(layouts)
    for segment in case.facts.encoder.encode(case.messages, 2, layouts).segments:
        runs = [tiny.SPECIALS["<IMG_CONTEXT>"]] * next(known).rows if segment.is_image else None
        ours += segment.ids if runs is None else runs
    assert ours == theirs
    assert [layout.rows for layout in layouts] == [52, 4]
    assert case.facts.prefix_ids == (*theirs[:6], tiny.SPECIALS["<img>"])


def unscaled(self, states, forward=vision.EncoderLayer.forward):
    self.scaled = False
    return forward(self, states)


def transposed(ops, x, edge, side, right=vision.in_blocks):
    turned = x.reshape(len(x), edge, edge, -1).transpose(1, 2)
    return right(ops, turned.reshape(x.shape), edge, side)


def last_row_dropped(self, *states, forward=vision.Projector.forward):
    skip, self.skip = self.skip, 0
    try:
        return forward(self, *(state[:, :-1] for state in states))
    finally:
        self.skip = skip


MISTAKES = {
    "updates are not scaled": (vision.EncoderLayer, "forward", unscaled),
    "blocks are read by columns": (vision, "in_blocks", transposed),
    "the class row is kept": (vision.Projector, "forward", last_row_dropped),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_encoder_are_noticed(case, monkeypatch, mistake):
    monkeypatch.setattr(*MISTAKES[mistake])
    assert case.difference(case.run()) > 1e-2


class ByColumns(TorchEncoder):
    """An encoder that is given the tiles of a wide image column by column."""

    def __call__(self, pixels, **given):
        if len(pixels) > 1:
            tiles = pixels[:-1].unflatten(0, (3, 4)).transpose(0, 1).flatten(0, 1)
            pixels = torch.cat([tiles, pixels[-1:]])
        return super().__call__(pixels, **given)


def test_tiles_in_another_order_are_noticed(case):
    assert case.difference(case.run(encoder=ByColumns)) > 1e-2


@pytest.mark.parametrize("mistake", ["whole first", "height for width"])
def test_mistakes_of_the_layout_are_noticed(case, monkeypatch, mistake):
    def layout(config, height, width):
        if mistake == "height for width":
            return internvl.layout(config, width, height)
        found = internvl.layout(config, height, width)
        return replace(found, whole="first") if found.whole else found

    monkeypatch.setitem(FAMILIES, "internvl", replace(internvl.INTERNVL, layout=layout))
    assert case.difference(case.run()) > 1e-2


def test_the_nearest_shape_counts_and_of_equals_the_larger():
    assert best_grid(480, 640, 448, 1, 12) == (3, 4)
    assert best_grid(448, 448, 448, 1, 12) == (1, 1)
    assert best_grid(896, 896, 448, 1, 12) == (2, 2)
    assert best_grid(10_000, 1, 448, 1, 12) == (12, 1)
